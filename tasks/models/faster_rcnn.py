"""Faster R-CNN on a single feature map (C4): a ResNet up to its third stage, and the fourth for every region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import Bottleneck
from torchvision.ops import MultiScaleRoIAlign

from qprune.errors import one_of

# Blocks of the four stages, and channels of the stem; `small` is for synthetic pictures on a CPU.
BACKBONES: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "resnet101": ((3, 4, 23, 3), 64),
    "resnet50": ((3, 4, 6, 3), 64),
    "small": ((1, 1, 1, 1), 8),
}
ASPECTS = (0.5, 1.0, 2.0)  # height / width of anchors
STRIDES = ("3x3", "1x1")
ROI_SIDE = 7  # cells of a region's features in each direction
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue
NO_LIMIT = 1 << 16  # pixels: longer than any picture


class FrozenBatchNorm(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode and is not trained.

    It owns parameters, unlike torchvision's class of that purpose: the paper's sizes count its weights and outputs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Stay in evaluation mode."""
        return super().train(False)


def stage(inputs: int, channels: int, blocks: int, stride: int, stride_in: str, scale: float = 1.0) -> nn.Sequential:
    """Build a stage of bottleneck blocks, (N, inputs, H, W) -> (N, 4 * channels, H / stride, W / stride).

    Args:
        inputs: Channels before.
        channels: A quarter of the channels after.
        blocks: Their number.
        stride: Of the first block.
        stride_in: The convolution of the first block that has the stride: `3x3`, as in torchvision's weights, or `1x1`,
            the first one, as in the paper.
        scale: Initial scale of each block's residual; frozen norms do not keep sums of many untrained blocks small.
    """
    outputs = channels * Bottleneck.expansion
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), FrozenBatchNorm(outputs))
    first = Bottleneck(inputs, channels, stride, shortcut, norm_layer=FrozenBatchNorm)
    if stride_in == "1x1":
        first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
    rest = [Bottleneck(outputs, channels, norm_layer=FrozenBatchNorm) for _ in range(blocks - 1)]
    layers = nn.Sequential(first, *rest)
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        elif isinstance(module, Bottleneck):
            nn.init.constant_(module.bn3.weight, scale)
    return layers


class Trunk(nn.Module):
    """The shared part, (N, 3, H, W) -> (N, 16 * width, H / 16, W / 16); its stem and first stage are not trained."""

    def __init__(self, blocks: Sequence[int], width: int, stride_in: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_in", nonlinearity="relu")
        self.bn1 = FrozenBatchNorm(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        scale = 1 / math.sqrt(sum(blocks))
        self.layer1 = stage(width, width, blocks[0], 1, stride_in, scale)
        self.layer2 = stage(4 * width, 2 * width, blocks[1], 2, stride_in, scale)
        self.layer3 = stage(8 * width, 4 * width, blocks[2], 2, stride_in, scale)
        for frozen in (self.conv1, self.layer1):
            frozen.requires_grad_(False)
        self.out_channels = 16 * width

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features


class ProposalHead(nn.Module):
    """Objectness and box offsets of every anchor; features (N, C, H, W) -> (N, A, H, W) and (N, 4 * A, H, W), in lists.

    As in the paper's implementation, objectness is a choice between two classes (2 * A outputs). Only the difference
    of their logits matters to a softmax, so it becomes the logit that torchvision's losses expect.
    """

    def __init__(self, inputs: int, anchors: int) -> None:
        super().__init__()
        hidden = inputs // 2  # 512 for the 1024 channels of the large backbones
        self.conv = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.relu = nn.ReLU()
        self.cls = nn.Conv2d(hidden, 2 * anchors, 1)
        self.bbox = nn.Conv2d(hidden, 4 * anchors, 1)
        for layer in (self.conv, self.cls, self.bbox):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]  # a convolution with a bias

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = [], []
        for level in features:
            hidden = self.relu(self.conv(level))
            background, object_ = self.cls(hidden).chunk(2, dim=1)
            logits.append(object_ - background)
            deltas.append(self.bbox(hidden))
        return logits, deltas


class RegionHead(nn.Module):
    """The fourth stage and the mean over a region: (R, C, 7, 7) -> (R, 2 * C, 1, 1)."""

    def __init__(self, inputs: int, blocks: int, width: int, stride_in: str, scale: float) -> None:
        super().__init__()
        self.layer4 = stage(inputs, 8 * width, blocks, 2, stride_in, scale)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.out_channels = 8 * width * Bottleneck.expansion

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(self.layer4(x))
        return pooled


class FasterRCNN(GeneralizedRCNN):
    """The detector, of torchvision's parts.

    Called with pictures, a list of (3, H, W) in [0, 1], and in training with targets (dicts of boxes and labels), it
    returns losses, or, in evaluation mode, dicts of boxes, labels and scores. Called with proposals (R, 4) in pixels
    of one normalized picture (1, 3, H, W), on any device, it returns the raw outputs for these regions, whose number is
    fixed: that is how its sizes are counted.

    Args:
        classes: With the background as class 0.
        backbone: A key of `BACKBONES`.
        short_side: Pixels to which pictures are resized.
        anchor_sizes: Sides of square anchors in pixels of the resized picture.
        rois: Regions per picture in training, at most a quarter of them objects.
        stride_in: See `stage`.
        proposals: Regions per picture in evaluation.
    """

    def __init__(
        self,
        classes: int = 21,
        backbone: str = "resnet101",
        short_side: int = 600,
        anchor_sizes: Sequence[int] = (128, 256, 512),
        rois: int = 128,
        stride_in: str = "3x3",
        proposals: int = 300,
    ) -> None:
        one_of("task.backbone", backbone, BACKBONES)
        one_of("task.stride_in", stride_in, STRIDES)
        blocks, width = BACKBONES[backbone]
        trunk = Trunk(blocks, width, stride_in)
        region_head = RegionHead(trunk.out_channels, blocks[3], width, stride_in, 1 / math.sqrt(sum(blocks)))
        rpn = RegionProposalNetwork(
            AnchorGenerator((tuple(anchor_sizes),), (ASPECTS,)),
            ProposalHead(trunk.out_channels, len(anchor_sizes) * len(ASPECTS)),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 12_000, "testing": 6_000},
            post_nms_top_n={"training": 2_000, "testing": proposals},
            nms_thresh=0.7,
        )
        heads = RoIHeads(
            # A fixed number of samples per cell: an adaptive one has no deterministic kernel on a GPU, and its
            # replacement would need more memory than a GPU has.
            MultiScaleRoIAlign(["0"], ROI_SIDE, sampling_ratio=2),
            region_head,
            FastRCNNPredictor(region_head.out_channels, classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=rois,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.0,
            nms_thresh=0.3,
            detections_per_img=100,
        )
        nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.001)
        for layer in (heads.box_predictor.cls_score, heads.box_predictor.bbox_pred):
            nn.init.zeros_(layer.bias)
        super().__init__(trunk, rpn, heads, GeneralizedRCNNTransform(short_side, NO_LIMIT, MEAN, STD, 1))

    def forward(self, images: Any, targets: Any = None, proposals: Tensor | None = None) -> Any:
        if proposals is None:
            return super().forward(images, targets)
        device = next(self.parameters()).device
        features = {"0": self.backbone(images.to(device))}
        objectness, deltas = self.rpn.head([features["0"]])
        regions = self.roi_heads.box_roi_pool(features, [proposals.to(device)], [tuple(images.shape[-2:])])
        return *objectness, *deltas, *self.roi_heads.box_predictor(self.roi_heads.box_head(regions))

    def load_imagenet(self, weights: dict[str, Tensor]) -> None:
        """Load the weights of torchvision's classifier of the same depth, without its last layer."""
        last = {name.removeprefix("layer4."): value for name, value in weights.items() if name.startswith("layer4.")}
        trunk = {name: value for name, value in weights.items() if not name.startswith(("layer4.", "fc."))}
        self.backbone.load_state_dict(trunk)
        self.roi_heads.box_head.layer4.load_state_dict(last)


def spread_regions(count: int, height: int, width: int) -> Tensor:
    """Place `count` regions (count, 4) of a third of the picture's sides from corner to corner, in pixels."""
    at = torch.linspace(0, 2 / 3, count)[:, None]
    return torch.cat((at * width, at * height, (at + 1 / 3) * width, (at + 1 / 3) * height), dim=1)
