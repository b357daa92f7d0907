"""The residual generator of CycleGAN (Zhu et al. 2017): two halvings, residual blocks, two doublings.

Every tensor that the recipe puts an operator on is the output of a module: `input`, `first.norm`, `down1.norm`,
`down2.norm`, `blocks.*.norm1`, `blocks.*.norm2`, `blocks.*` (the residual sum), `up1.norm`, `up2.norm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import one_of

NORMS = ("instance", "batch")


class Stage(nn.Module):
    """A convolution (biased where the norm has no shift of its own), a norm and a ReLU."""

    def __init__(self, conv: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """(N, C, H, W) -> (N, C, H, W): two 3x3 convolutions with reflected rims, and the input added. No ReLU behind."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        bias = norm == "instance"
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=bias)
        self.norm1 = normalisation(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=bias)
        self.norm2 = normalisation(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        out: Tensor = x + self.norm2(self.conv2(hidden))
        return out


class ResnetGenerator(nn.Module):
    """(N, channels, S, S) -> (N, channels, S, S) in -1..1; S is a multiple of 4, and 12 or more.

    blocks: residual blocks at a quarter of the size; 9 in the paper. width: channels of the first stage.
    norm: `instance` (no parameters; 11,378,179 in all) or `batch` (11,383,427, what the paper's sizes count).
    Initial weights are torch's own. Raises UserError for an unknown norm.
    """

    def __init__(self, blocks: int = 9, width: int = 64, norm: str = "instance", channels: int = 3) -> None:
        super().__init__()
        one_of("task.norm", norm, NORMS)
        bias = norm == "instance"

        def halving(inputs: int, outputs: int) -> Stage:
            conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=bias)
            return Stage(conv, normalisation(norm, outputs))

        def doubling(inputs: int, outputs: int) -> Stage:
            conv = nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1, bias=bias)
            return Stage(conv, normalisation(norm, outputs))

        first = nn.Conv2d(channels, width, 7, padding=3, padding_mode="reflect", bias=bias)
        self.first = Stage(first, normalisation(norm, width))
        self.down1 = halving(width, 2 * width)
        self.down2 = halving(2 * width, 4 * width)
        self.blocks = nn.Sequential(*(ResidualBlock(4 * width, norm) for _ in range(blocks)))
        self.up1 = doubling(4 * width, 2 * width)
        self.up2 = doubling(2 * width, width)
        self.last = nn.Conv2d(width, channels, 7, padding=3, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        x = self.down2(self.down1(self.first(x)))
        x = self.up2(self.up1(self.blocks(x)))
        return torch.tanh(self.last(x))


def normalisation(norm: str, channels: int) -> nn.Module:
    """Build a batch norm, or an instance norm without parameters or running statistics."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels)
