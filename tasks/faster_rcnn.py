"""Object detection on Pascal VOC 2007 with Faster R-CNN and ResNet-101 (Appendix B.3).

Densities in the accounting `paper`, from the paper's scores (tests hold them):

    row                        GB      paper         ours
    baseline                   2.2351  0.33          0.333
    P0.5(w), in both orders    0.9696  0.71, 0.71    0.768, 0.765
    P0.5(w,f), in both orders  0.7866  0.86, 0.82    0.928, 0.892

The lower two do not follow from the paper's own description. The second follows if pruned weights count 16 bits instead
of 4 and the input 32, the third with such weights and all but the frozen features at 4 bits. Ours count the frozen stem
and first stage as floats, and the rest at its own bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints
from urllib.error import URLError

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision.models import get_model_weights

from qprune.config.types import Fraction, Momentum, Pixels, Rate, Samples, Weight, check
from qprune.errors import UserError, closest
from qprune.tasks.data.detection import DetectionBatches, DetectionSet, Sample
from qprune.tasks.data.parts import part, training_part
from qprune.tasks.data.seeds import seeded
from qprune.tasks.data.source import real_root
from qprune.tasks.data.synthetic_detection import ShapePictures
from qprune.tasks.data.voc import PUBLISHED, VocPictures
from qprune.tasks.metrics.voc_map import Found, Truth, voc07_average_precisions
from qprune.tasks.models.faster_rcnn import FasterRCNN, spread_regions
from qprune.tasks.models.modes import evaluating
from qprune.tasks.optimizers import set_learning_rate
from qprune.training.task import DataOptions, Limits, Task

SIZE_COUNTED_AT = (480, 720)  # height and width in pixels of the input whose features the density charges
Regions = Annotated[int, Field(ge=1, le=10**4, json_schema_extra={"unit": "regions"})]
PICTURES = {"train": 160, "test": 32}  # of the synthetic set


@dataclass(frozen=True)
class DetectorOptions:
    """The part of the recipe that depends on the size of pictures and machine; keys of `task` and of `on_synthetic`.

    Attributes:
        backbone: See `FasterRCNN`, as for short_side, anchor_sizes, rois and proposals.
        pretrained: Begin with torchvision's ImageNet weights.
        stride_in: Of the trained network; the paper's sizes are counted with `1x1`.
        batch_size: Pictures per training step.
        learning_rate: Of SGD in the first epoch.
    """

    backbone: str = "resnet101"
    pretrained: bool = True
    short_side: Pixels = 600
    anchor_sizes: Sequence[Pixels] = (128, 256, 512)
    rois: Regions = 128
    proposals: Regions = 300
    stride_in: str = "3x3"
    batch_size: Samples = 1
    learning_rate: Rate = 1e-3


class FasterRcnn(Task):
    """Train Faster R-CNN. Score: VOC 2007 mean average precision in percent; density: (mAP / 100) per GB.

    The arguments from `backbone` to `learning_rate` are those of `DetectorOptions`.

    Args:
        data: Where the pictures come from.
        limits: How much of the recipe is run.
        seed: Of weights and order.
        lr_drop: Fraction of the epochs after which the learning rate is a tenth.
        momentum: Of SGD.
        weight_decay: Of SGD, but for biases.
        train_split: List in ImageSets/Main.
        test_split: List in ImageSets/Main.
        on_synthetic: Options that synthetic data replaces.

    Raises:
        UserError: The data or the pretrained weights are not usable.
    """

    metric = "map_percent"
    higher_is_better = True
    density_unit = "mAP/GB"
    train_batches: DetectionBatches
    network: FasterRCNN
    optimizer: torch.optim.SGD

    def __init__(
        self,
        *,
        data: DataOptions,
        limits: Limits,
        seed: int,
        backbone: str = "resnet101",
        pretrained: bool = True,
        short_side: Pixels = 600,
        anchor_sizes: Sequence[Pixels] = (128, 256, 512),
        rois: Regions = 128,
        proposals: Regions = 300,
        stride_in: str = "3x3",
        batch_size: Samples = 1,
        learning_rate: Rate = 1e-3,
        lr_drop: Fraction = 5 / 9,
        momentum: Momentum = 0.9,
        weight_decay: Weight = 1e-4,
        train_split: str = "trainval",
        test_split: str = "test",
        on_synthetic: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = DetectorOptions(
            backbone, pretrained, short_side, anchor_sizes, rois, proposals, stride_in, batch_size, learning_rate
        )
        if data.source == "synthetic":
            options = _replaced(options, on_synthetic or {})
        self.initial_rate = options.learning_rate
        self.momentum, self.weight_decay = momentum, weight_decay
        self.drop_epoch = max(1, round(lr_drop * limits.epochs))

        train, self.test, self.marks = _pictures(data, train_split, test_split)
        self.class_names = train.class_names
        self.dataset = {"train": train.checksum(), "test": self.test.checksum()}
        views, batch, marks = training_part(2 * len(train), options.batch_size, limits)
        self.test_rows, test_marks = part("test set", len(self.test), limits.test_samples)
        self.marks += [*_unlike_the_paper(options), *marks, *test_marks]
        self.train_batches = DetectionBatches(train, views, batch_size=batch, seed=seed)

        self.network_options: dict[str, Any] = {
            "classes": 1 + len(self.class_names),
            "backbone": options.backbone,
            "short_side": options.short_side,
            "anchor_sizes": tuple(options.anchor_sizes),
            "rois": options.rois,
            "proposals": options.proposals,
        }
        with seeded(seed, "network"):
            self.network = FasterRCNN(**self.network_options, stride_in=options.stride_in)
        if options.pretrained and data.fetch:  # a stored run has weights of its own
            self.network.load_imagenet(imagenet_weights(options.backbone))
        self.size_example = _counted(*SIZE_COUNTED_AT, options.rois)
        side = options.short_side
        self.example = _counted(side, side * SIZE_COUNTED_AT[1] // SIZE_COUNTED_AT[0], options.rois)

    @property
    def paper_network(self) -> nn.Module:
        """The network with the paper's strides, whose maps are smaller, on the meta device.

        With the regions of `size_example` its features are those of a training step on one picture.
        """
        with torch.device("meta"):
            return FasterRCNN(**self.network_options, stride_in="1x1")

    def learning_rate(self, epoch: int) -> float:
        """Return the rate of `epoch`: the initial one, and a tenth of it from the drop on."""
        return self.initial_rate * (0.1 if epoch >= self.drop_epoch else 1.0)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Build SGD with momentum on parameters that are not frozen, without weight decay for biases."""
        groups: dict[str, list[nn.Parameter]] = {"weights": [], "biases": []}
        for name, parameter in self.network.named_parameters():
            if parameter.requires_grad:
                groups["biases" if name.endswith(".bias") else "weights"].append(parameter)
        self.optimizer = torch.optim.SGD(
            [
                {"params": groups["weights"], "weight_decay": self.weight_decay},
                {"params": groups["biases"], "weight_decay": 0.0},
            ],
            lr=self.initial_rate,
            momentum=self.momentum,
        )
        return {"sgd": self.optimizer}

    def begin_epoch(self, epoch: int) -> None:
        """Set the learning rate of `epoch`."""
        set_learning_rate(self.learning_rate(epoch), self.optimizer)

    def train_step(self, batch: list[Sample]) -> dict[str, Tensor]:
        """Take a step of SGD on the sum of four losses: objectness, class, and the boxes of either."""
        device = next(self.network.parameters()).device
        self.optimizer.zero_grad(set_to_none=True)
        targets = [{"boxes": sample.boxes.to(device), "labels": sample.labels.to(device)} for sample in batch]
        losses: dict[str, Tensor] = self.network([_pixels(sample, device) for sample in batch], targets)
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        return {name.removeprefix("loss_"): loss.detach() for name, loss in losses.items()}

    def evaluate(self) -> dict[str, float]:
        """Return the mean average precision in percent over the classes with an object to find, and that of each."""
        device = next(self.network.parameters()).device
        found, truth = [], []
        with evaluating(self.network):
            for row in self.test_rows.tolist():
                sample = self.test[row]
                [output] = self.network([_pixels(sample, device)])
                found.append(Found(*(output[key].float().cpu() for key in ("boxes", "labels", "scores"))))
                truth.append(Truth(sample.boxes, sample.labels, sample.difficult))
        precisions = voc07_average_precisions(found, truth)
        if not precisions:
            raise UserError("no test picture shows an object that is not difficult; give task.test_split another list")
        each = {f"ap_percent_{self.class_names[label - 1]}": 100 * value for label, value in precisions.items()}
        return {self.metric: sum(each.values()) / len(each), **each}

    def density(self, score: float, size_bits: float) -> float:
        """Return (mAP / 100) per GB of 10^9 bytes, as the paper's figures are, although it writes Gb."""
        return (score / 100) / (size_bits / 8e9)


def imagenet_weights(backbone: str) -> dict[str, Tensor]:
    """Load torchvision's first ImageNet weights of a ResNet, from torch hub's cache or the web, or raise UserError."""
    remedy = "type task.pretrained=false to begin with random weights"
    if not backbone.startswith("resnet"):
        raise UserError(f"there are no pretrained weights for task.backbone={backbone}; {remedy}")
    weights = get_model_weights(backbone).IMAGENET1K_V1
    try:
        state: dict[str, Tensor] = weights.get_state_dict(check_hash=True, progress=False)
    except (OSError, URLError, RuntimeError) as error:
        raise UserError(
            f"the ImageNet weights {weights.url} cannot be had ({error}); put this file into "
            f"{torch.hub.get_dir()}/checkpoints, or {remedy}"
        ) from error
    return state


def _replaced(options: DetectorOptions, changes: Mapping[str, Any]) -> DetectorOptions:
    values = dict(vars(options))
    for key in changes:
        if key not in values:
            raise UserError(
                f"task.on_synthetic.{key} is not a key of it{closest(key, values)}; legal: {', '.join(values)}"
            )
        check(f"task.on_synthetic.{key}", changes[key], get_type_hints(DetectorOptions, include_extras=True)[key])
    return DetectorOptions(**(values | dict(changes)))


def _unlike_the_paper(options: DetectorOptions) -> list[str]:
    paper = vars(DetectorOptions())
    marks = [] if options.pretrained else ["not pretrained"]
    for key in ("backbone", "short_side", "rois", "proposals", "batch_size"):
        if vars(options)[key] != paper[key]:
            marks.append(f"{key}: {vars(options)[key]} instead of {paper[key]}")
    return marks


def _pictures(data: DataOptions, train_split: str, test_split: str) -> tuple[DetectionSet, DetectionSet, list[str]]:
    """Read training pictures, test pictures and marks."""
    root = real_root(data, "VOCdevkit")
    if root is None:
        train, test = (ShapePictures(count, part=name) for name, count in PICTURES.items())
        return train, test, ["synthetic data"]
    sets, marks = [], []
    for split, paper, key in (
        (train_split, "trainval", "task.train_split"),
        (test_split, "test", "task.test_split"),
    ):
        pictures = VocPictures(root, split, key, data.fetch)
        sets.append(pictures)
        if split != paper:
            marks.append(f"{key}: {split} ({len(pictures)} pictures) instead of {paper} ({PUBLISHED[paper]})")
        elif len(pictures) != PUBLISHED[paper]:
            marks.append(f"{key}: {len(pictures)} pictures of {PUBLISHED[paper]}")
    return sets[0], sets[1], marks


def _counted(height: int, width: int, rois: int) -> tuple[Tensor, None, Tensor]:
    """Return arguments of `FasterRCNN` for its raw outputs on as many regions as in a training step."""
    return torch.zeros(1, 3, height, width), None, spread_regions(rois, height, width)


def _pixels(sample: Sample, device: torch.device) -> Tensor:
    return sample.image.to(device).float().div(255)
