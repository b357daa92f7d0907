"""Random crops and flips of whole batches."""

from __future__ import annotations

import torch
from torch import Tensor


class CropAndFlip:
    """Pad with `margin` zeros on each side, crop to the old size at a random place, flip half of the pictures.

    The zeros are those of the raw picture, before normalization, as usual for CIFAR-10.
    """

    def __init__(self, margin: int = 4) -> None:
        self.margin = margin

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw (samples, 3) on the CPU: shifts down and right in -margin..margin pixels, and 1 for a flip."""
        shifts = torch.randint(-self.margin, self.margin + 1, (samples, 2), generator=generator)
        mirrored = torch.randint(0, 2, (samples, 1), generator=generator)
        return torch.cat((shifts, mirrored), dim=1)

    def __call__(self, pictures: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
        """Return `pictures` (N, C, H, W) at `rows` (B,), shifted and flipped by `drawn` (B, 3): (B, C, H, W)."""
        channels, height, width = pictures.shape[1:]
        down, right, mirrored = (drawn[:, i, None] for i in range(3))
        y = torch.arange(height, device=pictures.device) + down  # (B, H): the source row of each row
        across = torch.arange(width, device=pictures.device)
        x = torch.where(mirrored.bool(), width - 1 - across, across) + right  # (B, W)
        inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[:, None, None, :]
        cropped = pictures[
            rows[:, None, None, None],
            torch.arange(channels, device=pictures.device)[:, None, None],
            y.clamp(0, height - 1)[:, None, :, None],
            x.clamp(0, width - 1)[:, None, None, :],
        ]
        return cropped * inside
