"""The contract between the runner and a task."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qprune.config.build import DataOptions, Limits

__all__ = ["VALIDATION", "Batches", "DataOptions", "Limits", "Task"]

VALIDATION = "validation_"  # before a metric: that of the samples kept apart for choices (`data.validation`)


class Batches(Protocol):
    """Training data; an epoch is a pure function of (seed, epoch), to resume in it."""

    batch_size: int
    samples: int

    def __len__(self) -> int:
        """Return the steps per epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yield the batches of `epoch` from step `start` on, augmentation included."""
        ...


class Task(nn.Module, ABC):
    """One experiment: networks (as children), data, training step and evaluation.

    The constructor takes `data`, `limits` and `seed`, and arguments of its own, as keywords.
    """

    metric: str  #: Key of `evaluate()` that is the score.
    higher_is_better: bool
    density_unit: str = ""  #: Of `density`, such as `%/Mb`.
    network: nn.Module  #: The module that is compressed.
    #: An input of training size, (1, C, H, W), or a tuple of the network's arguments that begins with it, on which
    #: feature masks are sized.
    example: Tensor | tuple[Any, ...]
    size_example: Tensor | tuple[Any, ...]  #: Likewise; at its size, features are counted (spec 5.2).
    train_batches: Batches
    marks: list[str]  #: Reasons why the row may not pass for the paper's (synthetic data, a part of a set, ...).
    dataset: dict[str, str]  #: Checksum of the decoded arrays by name of the set.
    #: Whether `data.validation` is supported: `evaluate` then returns `validation_METRIC` too.
    validates = False

    @abstractmethod
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimizers by name; called once, with operators and device in place."""

    def begin_epoch(self, epoch: int) -> None:
        """Set learning rates for `epoch` (from 0), from which alone they must follow."""

    @abstractmethod
    def train_step(self, batch: Any) -> dict[str, Tensor]:
        """Take one step, forward, backward and optimizers; return detached scalar losses."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return all metrics on the test set, in evaluation mode and without gradients."""

    @abstractmethod
    def density(self, score: float, size_bits: float) -> float:
        """Return the performance density of a score at a size, in the task's unit."""

    @property
    def paper_network(self) -> nn.Module:
        """What the accounting `paper` counts: the network, or the paper's variant of it.

        Its modules are named as those of `network`.
        """
        return self.network

    def pictures(self) -> dict[str, Tensor]:
        """Return pictures for people, (3, H, W) in uint8 by name, saved with the run.

        Called as `evaluate` is: operators observe nothing, and random state is restored.
        """
        return {}

    def memory(self) -> dict[str, Any]:
        """Return further state, such as an image pool, as tensors and plain values."""
        return {}

    def restore_memory(self, memory: dict[str, Any]) -> None:
        """Restore what `memory` returned."""
