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
        """Steps per epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """The batches of `epoch` from step `start` on, augmentation included."""
        ...


class Task(nn.Module, ABC):
    """One experiment. It owns its networks (as children), data, optimizers, training step, metric and density.

    The runner reads these attributes, which the constructor sets:

    metric, higher_is_better: the key of `evaluate()` that is the score, and which way is better.
    network: the module that is compressed.
    example: an input of training size, (1, C, H, W), or a tuple of the network's arguments that begins with it, on
        which feature masks are sized.
    size_example: the input, or arguments, at which the size of features is counted (spec 5.2).
    train_batches: the training data.
    marks: reasons why the row must not pass for the paper's (synthetic data, a part of a set, ...).
    dataset: name of a set -> checksum of its decoded arrays.
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
        """The optimizers by name; called once, after operators are attached and the task is on its device."""

    def begin_epoch(self, epoch: int) -> None:
        """Set learning rates for `epoch` (from 0): a function of the epoch alone, so that nothing needs saving."""

    @abstractmethod
    def train_step(self, batch: Any) -> dict[str, Tensor]:
        """One step: forward, backward and optimizer steps. Returns the losses, detached scalars."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """All metrics on the test set, in evaluation mode and without gradients."""

    @abstractmethod
    def density(self, score: float, size_bits: float) -> float:
        """Performance density of a score at a size in bits, in the task's unit (spec 5.2)."""

    @property
    def paper_network(self) -> nn.Module:
        """What the accounting `paper` counts, at `size_example`: the network, or the variant that the paper counted.

        Its modules are named as those of `network`.
        """
        return self.network

    def pictures(self) -> dict[str, Tensor]:
        """Pictures for people, (3, H, W) in uint8 by name, saved beside the run after the last evaluation.

        Called as `evaluate` is: operators observe nothing, and random state is given back.
        """
        return {}

    def memory(self) -> dict[str, Any]:
        """What training remembers beside networks and optimizers (an image pool, say), as tensors and plain values."""
        return {}

    def restore_memory(self, memory: dict[str, Any]) -> None:
        """Take back what `memory` gave."""
