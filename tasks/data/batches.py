"""Training batches from tensors in memory: whole batches by one gather, no Python per sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from qprune.tasks.data.seeds import generator


class Augmentation(Protocol):
    """Random changes of pictures, split in two so that what is drawn does not depend on where it is applied."""

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """The random numbers of `samples` pictures, (samples, ...), on the CPU."""
        ...

    def __call__(self, pictures: Tensor, rows: Tensor, drawn: Tensor) -> Tensor:
        """`pictures[rows]`, (B, C, H, W), changed as `drawn`, (B, ...), says."""
        ...


class TensorBatches(nn.Module):
    """Pairs of inputs and targets in a random order, drawn anew for each epoch from (seed, epoch).

    inputs (N, ...), targets (N, ...): they move with `.to(device)` and stay out of the state dict. The last batch of
    an epoch may be smaller. `augmentation` is applied to the inputs only.
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
        """Steps per epoch."""
        return -(-self.samples // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (inputs, targets) of `epoch` from step `start` on: the tail of the uninterrupted epoch."""
        device = self.inputs.device
        order = torch.randperm(self.samples, generator=generator(self.seed, epoch, "order")).to(device)
        drawn = None
        if self.augmentation is not None:
            drawn = self.augmentation.draw(self.samples, generator(self.seed, epoch, "augmentation")).to(device)
        for step in range(start, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            rows = order[batch]
            if self.augmentation is None or drawn is None:
                yield self.inputs.index_select(0, rows), self.targets.index_select(0, rows)
            else:
                yield self.augmentation(self.inputs, rows, drawn[batch]), self.targets[rows]
