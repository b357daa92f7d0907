"""Training batches from two unpaired domains: each sample is one picture of each, drawn independently."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from qprune.errors import UserError
from qprune.tasks.data.augment import CropAndFlip
from qprune.tasks.data.images import read_images
from qprune.tasks.data.seeds import generator
from qprune.tasks.data.translation import resized


def read_domain(folder: Path, size: int) -> Tensor:
    """Read all pictures of a domain's folder by file name, (N, 3, size, size) in uint8; grey ones become RGB.

    Raises:
        UserError: The folder is missing or empty, or a picture cannot be decoded.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}; fetch the set with: qprune data get horse2zebra, set data.root=FOLDER or "
            "task.folder=FOLDER to where trainA, trainB, testA and testB are, or type data=synthetic to run without "
            "files"
        )
    return resized(read_images(folder, "task.folder"), size)


class UnpairedBatches(nn.Module):
    """Pictures of domains A and B, (N_A, C, H, W) and (N_B, C, H, W), drawn for each epoch from (seed, epoch).

    An epoch is as long as the larger domain: every picture of A once (repeated where A is smaller) in random order, and
    for each a random picture of B. The tensors move with `.to(device)` and are not in the state dict. Each domain has
    its own draws of `augmentation`. The last batch may be smaller.
    """

    a: Tensor
    b: Tensor

    def __init__(self, a: Tensor, b: Tensor, *, batch_size: int, seed: int, augmentation: CropAndFlip) -> None:
        super().__init__()
        self.register_buffer("a", a, persistent=False)
        self.register_buffer("b", b, persistent=False)
        self.batch_size, self.seed, self.augmentation = batch_size, seed, augmentation
        self.samples = max(len(a), len(b))

    def __len__(self) -> int:
        """Return the steps per epoch."""
        return -(-self.samples // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches (A, B) of `epoch` from step `start` on: the tail of the uninterrupted epoch."""
        device = self.a.device

        def drawing(purpose: str) -> torch.Generator:
            return generator(self.seed, epoch, purpose)

        rows_a = torch.randperm(self.samples, generator=drawing("order of A")) % len(self.a)
        rows_b = torch.randint(0, len(self.b), (self.samples,), generator=drawing("choice from B"))
        crops = [self.augmentation.draw(self.samples, drawing(f"augmentation of {name}")) for name in "AB"]
        rows_a, rows_b, crops_a, crops_b = (drawn.to(device) for drawn in (rows_a, rows_b, *crops))
        for step in range(start, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield (
                self.augmentation(self.a, rows_a[batch], crops_a[batch]),
                self.augmentation(self.b, rows_b[batch], crops_b[batch]),
            )
