"""Training batches from tensors in memory, without Python per sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qprune.tasks.data.augment import CropAndFlip
from qprune.tasks.data.seeds import generator


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
        augmentation: CropAndFlip | None = None,
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
        for step in range(start, len(self)):
            batch = slice(step * self.batch_size, (step + 1) * self.batch_size)
            rows = order[batch]
            if self.augmentation is None or drawn is None:
                inputs = self.inputs.index_select(0, rows)
            else:
                inputs = self.augmentation(self.inputs, rows, drawn[batch])
            yield inputs, self.targets.index_select(0, rows)
