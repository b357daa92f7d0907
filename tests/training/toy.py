"""A task that trains in milliseconds, with everything that a real one has: two losses, dropout, norms, memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprune.compression.compressor import Compressor, attach
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.plan import Plan
from qprune.compression.schedule import Schedule
from qprune.training.task import DataOptions, Limits, Task
from qprune.training.trainer import Loop, Trainer


class ToyBatches:
    """Random regression data; 10 samples in batches of 4, the last of which is short."""

    batch_size = 4
    samples = 10

    def __len__(self) -> int:
        return 3

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, 3):
            generator = torch.Generator().manual_seed(1000 * epoch + step)
            x = torch.randn(4 if step < 2 else 2, 2, 5, 5, generator=generator)
            yield x, x.mean(dim=(1, 2, 3), keepdim=True)


class Toy(Task):
    """Predicts the mean of a picture. `factor` scales the loss (infinity makes it fail)."""

    metric = "negative_mse"
    higher_is_better = True

    def __init__(
        self, *, data: DataOptions | None = None, limits: Limits | None = None, seed: int = 0, factor: float = 1.0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 1, 5)
        )
        self.example = self.size_example = torch.zeros(1, 2, 5, 5)
        self.train_batches = ToyBatches()
        self.marks, self.dataset, self.factor, self.calls = ["toy data"], {"train": "none"}, factor, 0
        self.steps_seen: list[int] = []

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.01)
        return {"adam": self.optimizer}

    def begin_epoch(self, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * 0.9**epoch

    def train_step(self, batch: Any) -> dict[str, Tensor]:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = (self.network(batch[0]) - batch[1]).square().mean() * self.factor
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "twice": 2 * loss.detach()}

    def evaluate(self) -> dict[str, float]:
        self.network.eval()
        x = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            error = (self.network(x) - x.mean(dim=(1, 2, 3), keepdim=True)).square().mean().item()
        return {"negative_mse": -error, "noise": float(torch.rand(()))}

    def density(self, score: float, size_bits: float) -> float:
        return score / size_bits

    def memory(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def restore_memory(self, memory: dict[str, Any]) -> None:
        self.calls = memory["calls"]


def prepared(folder: Path, **changes: Any) -> tuple[Toy, Compressor, Trainer]:
    """A toy run of 8 epochs of 3 steps with all phases: pruning at 3, 6, 9, 12; quantization from 15 and 18."""
    task = Toy(factor=changes.pop("factor", 1.0))
    timeline = Schedule(t_qw=5, t_qf=6, t_p=0, dt_p=1, n=4).in_steps(3, 4, window=6, samples_per_epoch=10)
    plan = Plan.from_globs(task.network, ["**"], ["0"], ["input", "1"], ["1"])
    compressor = attach(task.network, plan, timeline, task.example, PruneConfig(window=6), QuantizeConfig())
    places = {"checkpoints": folder / "checkpoints", "metrics": folder / "metrics.csv"}
    loop = Loop(epochs=8, seed=0, checkpoint_seconds_apart=0.0, **places, **changes)
    return task, compressor, Trainer(task, compressor, loop, torch.device("cpu"))


def before_step(trainer: Trainer, number: int, act: Callable[[], object]) -> None:
    """Have `act` called when step `number` is about to begin."""
    train_step = trainer.task.train_step

    def acting(batch: Any) -> dict[str, Tensor]:
        if trainer.step == number:
            act()
        return train_step(batch)

    trainer.task.train_step = acting  # type: ignore[method-assign]


class KilledError(Exception):
    """Stands for a process that died between two instructions."""


def killed(trainer: Trainer, step: int) -> None:
    """Train until `step` is about to begin, and die."""

    def die() -> None:
        raise KilledError

    before_step(trainer, step, die)
    with pytest.raises(KilledError):
        trainer.fit()


def assert_same_state(a: Task, b: Task) -> None:
    """Weights, statistics, operators and memory, to the last bit."""
    torch.testing.assert_close(a.state_dict() | a.memory(), b.state_dict() | b.memory(), rtol=0, atol=0)
