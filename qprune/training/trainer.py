"""The one training loop, for every task: steps, events, evaluation, checkpoints, and stopping without loss."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from qprune.atomic_write import write_atomically
from qprune.compression.compressor import Compressor
from qprune.compression.distributed import rank_and_world, set_batch_share
from qprune.errors import Interrupted, RunFailure, StoppedEarly
from qprune.runs.histograms import feature_histograms
from qprune.training import checkpoint
from qprune.training import nonfinite as finiteness
from qprune.training.compile import Ways
from qprune.training.distributed import (
    any_rank,
    autocast,
    average_gradients,
    losses_of_whole_batch,
    share_of,
    take_from_first_rank,
)
from qprune.training.progress import Reporter, Status
from qprune.training.signals import catching
from qprune.training.state import State, everything, on_cpu, restore
from qprune.training.task import Task
from qprune.training.warm_start import Stem

# With several ranks, stopping and timed checkpoints must be agreed on; every step would cost a wait on the device.
_STEPS_BETWEEN_AGREEMENTS = 16

Watch = Callable[[list[dict[str, Any]]], str | None]


@dataclass(frozen=True)
class Loop:
    """How a run is trained: length in epochs, folder to keep its state in, seed, precision, evaluation and checkpoints.

    evaluate_every: epochs between evaluations (the last epoch is always evaluated). checkpoint_minutes: time after
    which a checkpoint is written in the middle of an epoch; one is written after every epoch in any case if
    `checkpoint_seconds_apart` have passed since the last. compile, pack_features, fuse_relu: see `Ways`. watch: is
    shown the epochs so far (as in metrics.csv) after each but the last, by rank 0; a reason that it returns stops the
    run early. run: the run's signature, so that a checkpoint that strayed into the folder of another run is refused.
    """

    epochs: int
    folder: Path
    seed: int
    precision: str = "float32"
    evaluate_every: int = 1
    checkpoint_minutes: float = 5.0
    checkpoint_seconds_apart: float = 20.0
    compile: bool = False
    pack_features: bool = False
    fuse_relu: bool = False
    watch: Watch | None = None
    run: str = ""


class Trainer:
    """Trains `task` under `compressor` as `loop` says; both are on their device. Resumes what the folder holds.

    stem: the float part that is shared with other runs; what is there is taken over, what is missing is left there.
    """

    def __init__(
        self, task: Task, compressor: Compressor, loop: Loop, device: torch.device, stem: Stem | None = None
    ) -> None:
        self.task, self.compressor, self.loop, self.device, self.stem = task, compressor, loop, device, stem
        self.steps_per_epoch = len(task.train_batches)
        self.steps = loop.epochs * self.steps_per_epoch
        first = compressor.timeline.first_action
        # ends of epochs: the last up to which this is float training, and that at which it is left for others (a run
        # that is float throughout cannot know when they will begin: half-way serves most)
        last = self.steps - 1 if first is None else first
        self.float_steps = last // self.steps_per_epoch * self.steps_per_epoch
        self.steps_left = self.float_steps if first is not None else loop.epochs // 2 * self.steps_per_epoch
        self.steps_taken_over = 0
        self.optimizers = task.optimizers()
        self.ways = Ways(task, self.optimizers, compressor, device, loop.compile, loop.pack_features, loop.fuse_relu)
        average_gradients(self.optimizers.values())
        self.main = rank_and_world()[0] == 0
        self.state = State()
        self.sums: dict[str, Tensor] = {}
        self.saved_at = time.monotonic()
        self.stop_signal: int | None = None
        self.first: dict[str, Any] | None = None  # the state that training began with, until there is a checkpoint
        self.finite_names: set[str] = set()

    def fit(self) -> dict[str, float]:
        """Train to the last epoch and return its evaluation. Raises Interrupted, StoppedEarly (saved), RunFailure."""
        torch.manual_seed(self.loop.seed + 7919 * rank_and_world()[0])
        if restore(self):
            self._write_metrics()
        else:
            self.first = on_cpu(everything(self))
        usual = finiteness.numbers_of(self.task)
        self.finite_names = usual.keys() - finiteness.not_finite(usual.items())
        state, metric = self.state, self.task.metric
        with catching(self), Reporter(state.step, self.steps, silent=not self.main) as reporter:
            while state.step < self.steps:
                epoch, offset = divmod(state.step, self.steps_per_epoch)
                self._train_epoch(epoch, offset, reporter)
                row = self._end_epoch(epoch)
                reporter.show(self._status(row["loss"], row.get(metric)), permanent=True)
                if state.step < self.steps:
                    self._stop_or_save()
                    self._ask_watch()
        self.compressor.at(self.steps)
        final = state.metrics[-1] if state.metrics and metric in state.metrics[-1] else self._evaluate()
        return {name: value for name, value in final.items() if name in self._metric_names(final)}

    def _metric_names(self, row: dict[str, Any]) -> list[str]:
        return [name for name in row if name not in _EPOCH_COLUMNS and not name.startswith("loss")]

    def _steps(self, epoch: int, offset: int) -> Iterator[dict[str, Tensor]]:
        """Train the steps of an epoch from `offset` on; yields each step's losses, the state being that after it."""
        task, state = self.task, self.state
        task.begin_epoch(epoch)
        self.ways.begin_epoch()
        task.train()
        for batch in task.train_batches.epoch(epoch, start=offset):
            self.compressor.at(state.step)
            part, share = share_of(batch)
            set_batch_share(share)
            with self.ways.of_step(state.step), autocast(self.device, self.loop.precision):
                losses = task.train_step(part)
            state.step += 1
            yield losses_of_whole_batch(losses)

    def steps_until(self, last: int) -> Iterator[dict[str, Tensor]]:
        """Train up to step `last`, without evaluations and checkpoints; yields each step's losses."""
        while self.state.step < last:
            for losses in self._steps(*divmod(self.state.step, self.steps_per_epoch)):
                yield losses
                if self.state.step == last:
                    return

    def _train_epoch(self, epoch: int, offset: int, reporter: Reporter) -> None:
        state = self.state
        started = time.monotonic()
        for losses in self._steps(epoch, offset):
            for name, loss in losses.items():
                self.sums[name] = self.sums[name] + loss if name in self.sums else loss.clone()
            state.loss_count += 1
            taken, started = time.monotonic() - started, time.monotonic()
            state.seconds += self.ways.of_training(taken)
            if reporter.due():
                reporter.show(self._status(self._mean_loss(), self._last_score()))
            if state.step % self.steps_per_epoch:  # at the end of an epoch it is evaluated and logged first
                self._stop_or_save()

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        """Evaluate, log and save at the end of an epoch. Returns the epoch's row."""
        state, last = self.state, epoch + 1 == self.loop.epochs
        step = state.step - 1  # modes are those of the last step that was trained
        loss = self._mean_loss()
        row: dict[str, Any] = {"epoch": epoch + 1, "step": state.step, "phase": self.compressor.timeline.phase(step)}
        row |= {f"{kind}_sparsity": value for kind, value in self.compressor.sparsity.items()}
        row |= {"learning_rate": next(iter(self.optimizers.values())).param_groups[0]["lr"], "loss": loss}
        if len(self.sums) > 1:
            row |= {f"loss_{name}": float(total) / state.loss_count for name, total in self.sums.items()}
        if last or (epoch + 1) % self.loop.evaluate_every == 0:
            row |= self._evaluate()
        self.sums, state.loss_count = {}, 0
        state.metrics.append(row)
        self._write_metrics()
        apart = min(self.loop.checkpoint_seconds_apart, 60 * self.loop.checkpoint_minutes)
        recent = time.monotonic() - self.saved_at < apart
        if last or not any_rank(recent, self.device):
            self._save()
        if self.stem is not None and state.step == self.steps_left:
            self._require_finite()
            self.stem.save(everything(self), self.optimizers)
        return row

    def _write_metrics(self) -> None:
        if self.main:
            table = pd.DataFrame(self.state.metrics).to_csv(index=False)
            write_atomically(self.loop.folder / "metrics.csv", table.encode())

    def _evaluate(self) -> dict[str, float]:
        """The task's metrics on rank 0's norms, with random state of its own so that evaluation changes nothing."""
        take_from_first_rank(self.task)
        self._require_finite()
        with self._observing_nothing(), finiteness.watched_evaluation(self.task.network) as good:
            metrics = self.task.evaluate()
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        # A picture or a class that is made of NaN may score all the same.
        layers = [finiteness.readable(name) or "the network" for name, is_good in good.items() if not is_good]
        bad += [f"the output of {layer} is not finite" for layer in layers]
        if bad:
            step = f"in the evaluation after step {self.state.step} ({self.phase()})"
            raise RunFailure(f"{bad[0]} {step}; no row is written")
        return metrics

    def pictures(self) -> dict[str, Tensor]:
        """The task's pictures, made as its evaluation is."""
        with self._observing_nothing():
            return self.task.pictures()

    def histograms(self) -> list[dict[str, Any]]:
        """How the test set's values lie at every feature quantizer, see `feature_histograms`."""
        with self._observing_nothing(), torch.no_grad():
            return feature_histograms(self.task.network, self.task.evaluate)

    @contextmanager
    def _observing_nothing(self) -> Iterator[None]:
        """Random state of its own, from the seed, and operators that collect nothing."""
        devices = [self.device] if self.device.type == "cuda" else []
        with self.ways.of_evaluation(), self.compressor.evaluating(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.loop.seed)
            with autocast(self.device, self.loop.precision):
                yield

    def phase(self) -> str:
        """The phase of the last step that was trained, for people."""
        return f"phase {self.compressor.timeline.phase(max(0, self.state.step - 1))}"

    def _last_score(self) -> float | None:
        scores = [row[self.task.metric] for row in self.state.metrics if self.task.metric in row]
        return scores[-1] if scores else None

    def _status(self, loss: float, score: float | None) -> Status:
        state = self.state
        epoch = min(self.loop.epochs, (state.step - 1) // self.steps_per_epoch + 1)
        return Status(
            step=state.step,
            steps=self.steps,
            epoch=epoch,
            epochs=self.loop.epochs,
            loss=loss,
            phase=self.compressor.timeline.phase(state.step - 1),
            metric=self.task.metric,
            score=score if score is not None else self._last_score(),
            sparsity=self.compressor.sparsity,
        )

    def _mean_loss(self) -> float:
        """Mean of all losses since the epoch began. Raises RunFailure when it is not finite."""
        count = max(1, self.state.loss_count)
        for name, total in self.sums.items():
            if not math.isfinite(float(total)):
                raise finiteness.failure(self, f"the loss {name!r} is {float(total)}")
        return sum(float(total) for total in self.sums.values()) / count

    def _require_finite(self) -> None:
        """Raise RunFailure for weights or statistics that became NaN or infinite, though the losses may not show it."""
        numbers = finiteness.numbers_of(self.task).items()
        if bad := finiteness.not_finite((name, tensor) for name, tensor in numbers if name in self.finite_names):
            raise finiteness.failure(self, f"{bad[0]} is not finite")

    def _stop_or_save(self) -> None:
        agree_now = rank_and_world()[1] == 1 or self.state.step % _STEPS_BETWEEN_AGREEMENTS == 0
        if not agree_now:
            return
        late = time.monotonic() - self.saved_at > 60 * self.loop.checkpoint_minutes
        if any_rank(self.stop_signal is not None, self.device):
            self._save()
            name = signal.Signals(self.stop_signal or signal.SIGTERM).name
            raise Interrupted(
                f"stopped by {name} after step {self.state.step} of {self.steps}, with everything saved; "
                "the same command goes on from there"
            )
        if any_rank(late, self.device):
            self._save()

    def _ask_watch(self) -> None:
        reason = self.loop.watch(self.state.metrics) if self.loop.watch and self.main else None
        if any_rank(reason is not None, self.device):
            self._save()
            raise StoppedEarly(
                f"stopped early after step {self.state.step} of {self.steps}: {reason or 'its watch says so'}"
            )

    def _save(self) -> None:
        self._mean_loss()  # a state that is not finite is never kept
        self._require_finite()
        self.compressor.collect_on_first_rank()
        self.saved_at = time.monotonic()
        if not self.main:
            return
        checkpoint.save(self.loop.folder / "checkpoints", self.state.step, everything(self))
        self.first = None


_EPOCH_COLUMNS = ("epoch", "step", "phase", "weight_sparsity", "feature_sparsity", "learning_rate")
