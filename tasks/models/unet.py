"""The U-Net generator of Pix2Pix (Isola et al. 2017): an encoder and a decoder joined at every resolution.

Every tensor that the recipe puts an operator on is the output of a module, at any depth: `outer_down`, `downs.*`,
`inner_down`, `joins.*`, `ups.*.norm`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.errors import UserError

SLOPE = 0.2  # of the encoder's leaky ReLU
DROPPING = 3  # middle decoder stages next to the bottleneck that have dropout, while they are of full width
WIDEST = 8  # channels at most, in multiples of the first stage's


class Down(nn.Module):
    """(N, C, H, W) -> (N, out, H/2, W/2): convolution 4x4 of stride 2, then an optional batch norm."""

    def __init__(self, channels: int, out: int, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 4, stride=2, padding=1, bias=False)
        self.norm: nn.Module | None = nn.BatchNorm2d(out) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out if self.norm is None else self.norm(out)


class Up(nn.Module):
    """(N, C, H, W) -> (N, out, 2H, 2W): transposed convolution 4x4, batch normalisation, dropout."""

    def __init__(self, channels: int, out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.norm(self.conv(x)))
        return out


class Join(nn.Module):
    """Encoder's and decoder's features, channels of both: a module, because its output is quantized."""

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return torch.cat((skip, x), dim=1)


class UNet(nn.Module):
    """(N, channels, S, S) -> (N, channels, S, S) in -1..1; S is a multiple of 2**depth.

    depth: halvings on the way down; 8 makes the paper's network, for S = 256. width: channels of the first stage.
    extra_norm: a batch normalisation after the first convolution, which the paper's authors added to the original.
    54,413,955 parameters, 54,414,083 with it. Initial weights are torch's own. Raises UserError for a bad depth.
    """

    def __init__(
        self, depth: int = 8, width: int = 64, dropout: float = 0.5, extra_norm: bool = False, channels: int = 3
    ) -> None:
        super().__init__()
        if depth < 3:
            raise UserError(f"task.depth={depth} leaves no stage between the outer and the inner one; type 3 or more")
        stages = [width * min(2**level, WIDEST) for level in range(depth)]
        # level k halves stages[k - 1] -> stages[k]; on the way up, the join below it has twice the channels of k
        self.outer_down = Down(channels, stages[0], norm=extra_norm)
        self.downs = nn.ModuleList(Down(stages[k - 1], stages[k]) for k in range(1, depth - 1))
        self.inner_down = Down(stages[-2], stages[-1], norm=False)
        self.inner_up = Up(stages[-1], stages[-2])
        # the authors' dropout stands where encoder and decoder keep the full width, next to the bottleneck
        self.ups = nn.ModuleList(
            Up(
                2 * stages[k],
                stages[k - 1],
                dropout if stages[k] == stages[k - 1] and depth - 2 - k < DROPPING else 0.0,
            )
            for k in range(depth - 2, 0, -1)
        )
        self.joins = nn.ModuleList(Join() for _ in range(depth - 1))
        self.outer_up = nn.ConvTranspose2d(2 * stages[0], channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer_down(x)
        skips = []
        for down in (*self.downs, self.inner_down):
            # the joined tensor has passed the activation, which works in place in the original
            x = F.leaky_relu(x, SLOPE)
            skips.append(x)
            x = down(x)
        for up, join in zip((self.inner_up, *self.ups), self.joins, strict=True):
            x = join(skips.pop(), up(F.relu(x)))
        picture: Tensor = torch.tanh(self.outer_up(F.relu(x)))
        return picture
