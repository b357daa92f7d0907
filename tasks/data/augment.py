"""Random crops and flips of whole batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class CropAndFlip:
    """Crop squares of `size` pixels from pictures of `side` pixels at random places, and flip half of them.

    padding: zeros added on each side of the unnormalized picture before cropping, in pixels.
    """

    def __init__(self, size: int, side: int, padding: int = 0) -> None:
        self.size, self.padding = size, padding
        self.last = side + 2 * padding - size  # row or column at which a crop can begin

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw (samples, 3) on the CPU: first row, first column, and 1 for a flip."""
        corners = torch.randint(0, self.last + 1, (samples, 2), generator=generator)
        return torch.cat((corners, torch.randint(0, 2, (samples, 1), generator=generator)), dim=1)

    def __call__(self, pictures: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
        """Return `pictures` (N, C, S, S) at `rows` (B,), cropped and flipped by `drawn` (B, 3): (B, C, size, size)."""
        padded = F.pad(pictures.index_select(0, rows), [self.padding] * 4)
        samples, channels = (torch.arange(count, device=pictures.device) for count in padded.shape[:2])
        along = torch.arange(self.size, device=pictures.device)
        down, right, mirrored = (drawn[:, i, None] for i in range(3))
        y = along + down  # (B, size): the source row of each row
        x = torch.where(mirrored.bool(), self.size - 1 - along, along) + right
        return padded[samples[:, None, None, None], channels[:, None, None], y[:, None, :, None], x[:, None, None, :]]
