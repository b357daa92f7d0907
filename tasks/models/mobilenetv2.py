"""MobileNetV2 for 32x32 pictures (Sandler et al. 2018), in the CIFAR-10 variant of the paper."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Stage(NamedTuple):
    """A run of blocks: only the first one has `stride`, the others keep the size."""

    expansion: int
    channels: int
    blocks: int
    stride: int


# The ImageNet network halves the picture five times. Here the stem and the second stage keep its size, so that
# 32x32 pixels become 4x4 before pooling.
STAGES = (
    Stage(expansion=1, channels=16, blocks=1, stride=1),
    Stage(expansion=6, channels=24, blocks=2, stride=1),
    Stage(expansion=6, channels=32, blocks=3, stride=2),
    Stage(expansion=6, channels=64, blocks=4, stride=2),
    Stage(expansion=6, channels=96, blocks=3, stride=1),
    Stage(expansion=6, channels=160, blocks=3, stride=2),
    Stage(expansion=6, channels=320, blocks=1, stride=1),
)


class Block(nn.Module):
    """Inverted residual: 1x1 expansion, 3x3 depthwise, linear 1x1 projection.

    (N, C, H, W) -> (N, out_channels, H / stride, W / stride). There is no ReLU at the end, so the block's output is
    the residual sum itself (stride 1) or the output of `bn3` (stride 2): the tensor that the paper quantizes.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.residual = stride == 1
        self.shortcut: nn.Module = nn.Identity()
        if self.residual and in_channels != out_channels:
            # This variant adds a projected input where the channels change, unlike the ImageNet network.
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        out: Tensor = self.bn3(self.conv3(hidden))
        return out + self.shortcut(x) if self.residual else out


class MobileNetV2(nn.Module):
    """(N, 3, 32, 32) -> logits (N, classes). 2,296,922 parameters with 10 classes; PyTorch's default initialisation."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        channels = 32
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        blocks = []
        for stage in STAGES:
            for position in range(stage.blocks):
                stride = stage.stride if position == 0 else 1
                blocks.append(Block(channels, stage.channels, stage.expansion, stride))
                channels = stage.channels
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(channels, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.pool = nn.AvgPool2d(4)  # a module, because its output is quantized
        self.linear = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(x)))
        hidden = self.layers(hidden)
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        logits: Tensor = self.linear(self.pool(hidden).flatten(1))
        return logits
