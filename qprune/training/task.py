"""The contract between the runner and a task: what is trained, on what, and how its score becomes a density."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DataOptions:
    """Where a task's data comes from.

    source: `real` (files below `root`) or `synthetic` (made in memory from the seed, offline).
    verify: whether a real set whose checksums differ from the published ones is refused.
    """

    source: str = "real"
    root: str | None = None
    verify: bool = True


@dataclass(frozen=True)
class Limits:
    """How much of the recipe is run. `None` stands for 'all of it'.

    epochs: number of epochs that will be trained (already scaled by the budget).
    steps_per_epoch: optimizer steps per epoch at most; batch_size: samples per step at most;
    test_samples: test samples at most.
    """

    epochs: int
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    test_samples: int | None = None


class Batches(Protocol):
    """Training data. One epoch is a pure function of (seed, epoch), so that a run resumes in the middle of one."""

    batch_size: int
    samples: int

    def __len__(self) -> int:
        """Return the steps per epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield the batches of `epoch` from step `start` on, augmentation included."""
        ...


class Task(nn.Module, ABC):
    """One experiment: networks (as children), data, optimizers, training step, metric and density.

    The constructor takes `data`, `limits`, `seed` and keys of its own by name, and sets the attributes.

    Attributes:
        metric: The key of `evaluate()` that is the score.
        higher_is_better: Whether a higher score is better.
        network: The module that is compressed.
        example: An input of training size, (1, C, H, W), or a tuple of the network's arguments that begins with it; it
            sizes feature masks.
        size_example: The input, or arguments, at which the size of features is counted.
        train_batches: The training data.
        marks: Reasons why the row is not comparable with the paper's (synthetic data, a part of a set, ...).
        dataset: Name of a set -> checksum of its decoded arrays.
    """

    metric: str
    higher_is_better: bool
    network: nn.Module
    example: Tensor | tuple[Any, ...]
    size_example: Tensor | tuple[Any, ...]
    train_batches: Batches
    marks: list[str]
    dataset: dict[str, str]

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name; called once, with operators attached and the task on its device."""

    def begin_epoch(self, epoch: int) -> None:
        """Set learning rates for `epoch` (from 0): a function of the epoch alone, so that nothing needs saving."""

    @abstractmethod
    def train_step(self, batch: Any) -> dict[str, Tensor]:
        """Take one step (forward, backward, optimizers) and return the losses, detached scalars."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return all metrics on the test set, in evaluation mode and without gradients."""

    @abstractmethod
    def density(self, score: float, size_bits: float) -> float:
        """Return the performance density of a score at a size in bits, in the task's unit."""

    @property
    def paper_network(self) -> nn.Module:
        """The network that the accounting `paper` counts at `size_example`, with `network`'s names of modules."""
        return self.network

    def pictures(self) -> dict[str, Tensor]:
        """Return pictures, (3, H, W) in uint8 by name, to be saved with the run after the last evaluation."""
        return {}

    def memory(self) -> dict[str, Any]:
        """Return training state beside networks and optimizers (an image pool), as tensors and plain values."""
        return {}

    def restore_memory(self, memory: dict[str, Any]) -> None:
        """Restore what `memory` returned."""
