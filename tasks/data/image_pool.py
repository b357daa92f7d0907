"""A pool of generated pictures, so that a discriminator also sees older ones (Shrivastava et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor


class ImagePool:
    """Holds up to `size` pictures (C, H, W); `size` 0 passes everything through.

    Randomness comes from torch's global generator of the CPU, whose state a run saves.
    """

    def __init__(self, size: int = 50) -> None:
        self.size = size
        self.pictures: list[Tensor] = []

    def exchange(self, batch: Tensor) -> Tensor:
        """Replace each picture of (N, C, H, W), with a chance of one half, by an older one whose place it takes.

        Until the pool is full, every picture is kept and returned.
        """
        if self.size == 0:
            return batch
        out = []
        for picture in batch.detach():
            if len(self.pictures) < self.size:
                self.pictures.append(picture.clone())
                out.append(picture)
            elif float(torch.rand(())) > 0.5:
                place = int(torch.randint(0, self.size, ()))
                out.append(self.pictures[place])
                self.pictures[place] = picture.clone()
            else:
                out.append(picture)
        return torch.stack(out)

    def contents(self) -> list[Tensor]:
        """Return the pool's pictures, in order, on the CPU."""
        return [picture.cpu() for picture in self.pictures]

    def refill(self, pictures: list[Tensor], device: torch.device) -> None:
        """Restore what `contents` returned."""
        self.pictures = [picture.to(device) for picture in pictures]
