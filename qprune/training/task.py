"""The contract between the runner and a task: what is trained, on what, and how a score becomes a density."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qprune.config.build import DataOptions, Limits

__all__ = ["Batches", "DataOptions", "Limits", "Task"]


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
    """One experiment: its networks (as children), data, optimizers, training step, metric and density.

    The constructor takes `data`, `limits` and `seed`, and arguments of its own, as keywords.

    Attributes:
        metric: Key of `evaluate()` that is the score.
        higher_is_better: Which way the score is better.
        network: The module that is compressed.
        example: An input of training size, (1, C, H, W), or a tuple of the network's arguments that begins with it, on
            which feature masks are sized.
        size_example: The input, or arguments, at which the size of features is counted (spec 5.2).
        train_batches: The training data.
        marks: Reasons why the row may not pass for the paper's (synthetic data, a part of a set, ...).
        dataset: Checksum of the decoded arrays by name of the set.
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
        """Return the optimizers by name; called once, after operators are attached and the task is on its device."""

    def begin_epoch(self, epoch: int) -> None:
        """Set learning rates for `epoch` (from 0): a function of the epoch alone, so that nothing needs saving."""

    @abstractmethod
    def train_step(self, batch: Any) -> dict[str, Tensor]:
        """Take one step: forward, backward and optimizer steps. Returns the losses, detached scalars."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return all metrics on the test set, in evaluation mode and without gradients."""

    @abstractmethod
    def density(self, score: float, size_bits: float) -> float:
        """Return the performance density of a score at a size in bits, in the task's unit (spec 5.2)."""

    @property
    def paper_network(self) -> nn.Module:
        """What the accounting `paper` counts, at `size_example`: the network, or the variant that the paper counted.

        Its modules are named as those of `network`.
        """
        return self.network

    def pictures(self) -> dict[str, Tensor]:
        """Return pictures for people, (3, H, W) in uint8 by name, saved beside the run after the last evaluation.

        Called as `evaluate` is: operators observe nothing, and random state is restored.
        """
        return {}

    def memory(self) -> dict[str, Any]:
        """Return the state beside networks and optimizers (an image pool, say), as tensors and plain values."""
        return {}

    def restore_memory(self, memory: dict[str, Any]) -> None:
        """Restore what `memory` returned."""
