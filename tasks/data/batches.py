"""Training batches from tensors in memory, gathered several at a time, without Python per sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from qprune.tasks.data.seeds import generator

# Batches per gather: in a step of three milliseconds, a gather per batch takes a noticeable part.
_GATHERED_AT_ONCE = 16


class Augmentation(Protocol):
    """Random changes of pictures; draws are separate, so that they do not depend on the device."""

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Draw the random numbers of `samples` pictures, (samples, ...), on the CPU."""
        ...

    def __call__(self, pictures: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
        """Return `pictures[rows]`, (B, C, H, W), changed by `drawn`, (B, ...)."""
        ...


class TensorBatches(nn.Module):
    """Pairs of inputs and targets in a random order, drawn for each epoch from (seed, epoch).

    The tensors move with `.to(device)` and are not in the state dict.

    Args:
        inputs: (N, ...).
        targets: (N, ...).
        batch_size: Samples per batch; the last one of an epoch may be smaller.
        seed: Of order and augmentation.
        augmentation: Of the inputs.
    """

    inputs: Tensor
    targets: Tensor

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int,
        seed: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("inputs", inputs, persistent=False)
        self.register_buffer("targets", targets, persistent=False)
        self.batch_size = batch_size
        self.samples = len(inputs)
        self.seed = seed
        self.augmentation = augmentation

    def __len__(self) -> int:
        """Return the steps per epoch."""
        return -(-self.samples // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches (inputs, targets) of `epoch` from step `start` on: the tail of the uninterrupted epoch."""
        device = self.inputs.device
        order = torch.randperm(self.samples, generator=generator(self.seed, epoch, "order")).to(device)
        drawn = None
        if self.augmentation is not None:
            drawn = self.augmentation.draw(self.samples, generator(self.seed, epoch, "augmentation")).to(device)
        size, first = self.batch_size, start * self.batch_size
        if self.augmentation is None or drawn is None:
            for at in range(first, self.samples, _GATHERED_AT_ONCE * size):
                rows = order[at : at + _GATHERED_AT_ONCE * size]
                inputs, targets = self.inputs.index_select(0, rows), self.targets.index_select(0, rows)
                yield from zip(inputs.split(size), targets.split(size), strict=True)
        else:
            for at in range(first, self.samples, size):
                rows = order[at : at + size]
                yield self.augmentation(self.inputs, rows, drawn[at : at + size]), self.targets.index_select(0, rows)
