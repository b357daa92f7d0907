"""The one training loop: steps, events, evaluation, checkpoints, stopping."""

import errno
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qprune.atomic_write import explained, write_atomically
from qprune.compression.compressor import Compressor
from qprune.compression.distributed import rank_and_world, set_batch_share
from qprune.errors import Interrupted, RunFailure, StoppedEarly, UserError
from qprune.training import checkpoint, nonfinite
from qprune.training.compile import CompiledSteps, eager, fuse
from qprune.training.distributed import (
    any_rank,
    autocast,
    average_gradients,
    losses_of_whole_batch,
    share_of,
    take_from_first_rank,
)
from qprune.training.progress import Reporter, print_text
from qprune.training.task import Task
from qprune.training.warm_start import WarmStart, steps_to_leave

# With several ranks, stopping and timed checkpoints must be agreed on; every step would cost a wait on the device.
_STEPS_BETWEEN_AGREEMENTS = 16
_EPOCH_COLUMNS = ("epoch", "step", "phase", "weight_sparsity", "feature_sparsity", "learning_rate")

Watch = Callable[[list[dict[str, Any]]], str | None]


@dataclass(frozen=True)
class Loop:
    """How a run is trained."""

    epochs: int
    checkpoints: Path  # folder; training resumes from the newest checkpoint
    metrics: Path  # CSV file that gets one line per epoch
    seed: int  # of all random numbers of training and evaluation
    precision: str = "float32"  # or the type of autocast
    evaluate_every: int = 1  # epochs; the last one is always evaluated
    checkpoint_minutes: float = 5.0  # after which a checkpoint is written in the middle of an epoch
    checkpoint_seconds_apart: float = 20.0  # after which one is written at the end of an epoch
    warm_start_at: Sequence[float] = ()  # first events of other runs in epochs; while it is float, a run serves them
    compile: bool = False  # see `CompiledSteps`
    watch: Watch | None = None  # called by rank 0 after each epoch but the last; a reason stops the run early
    run: str = ""  # its signature: a checkpoint of another run is refused
    events: Path | None = None  # folder that keeps the state before each event, and at the warm start


class Trainer:
    """Trains a task under a compressor, and resumes from its newest checkpoint.

    `warm_start` is the float prefix shared with other runs, to begin from or to leave; None for a run by itself.
    """

    def __init__(
        self, task: Task, compressor: Compressor, loop: Loop, device: torch.device, warm_start: WarmStart | None = None
    ) -> None:
        self.task, self.compressor, self.loop, self.device, self.warm_start = task, compressor, loop, device, warm_start
        self.steps_per_epoch = len(task.train_batches)
        self.steps = loop.epochs * self.steps_per_epoch
        first = compressor.timeline.first_action
        # Ends of epochs: the last before any operator acts or observes, and those at which a warm start is left. When
        # others begin is in `warm_start_at`; a run that is float throughout has no such time itself: half-way.
        last = self.steps - 1 if first is None else first
        self._float_steps = last // self.steps_per_epoch * self.steps_per_epoch
        own = loop.epochs // 2 * self.steps_per_epoch if first is None else self._float_steps
        others = steps_to_leave(loop.warm_start_at, compressor.timeline)
        self._shared_steps = {own, *(step for step in others if step <= self._float_steps)}
        events = compressor.timeline.events if loop.events else ()
        self._kept_steps = {self._float_steps, *events} if events else set()
        self.steps_taken_over = 0  # from a warm start
        self.optimizers = task.optimizers()
        self.compiled = CompiledSteps(task.network, compressor.timeline, device) if loop.compile else None
        if loop.compile:
            fuse(self.optimizers.values())
        average_gradients(self.optimizers.values())
        self.main = rank_and_world()[0] == 0
        self.step, self.seconds = 0, 0.0
        self.metrics: list[dict[str, Any]] = []
        self._loss_sums: dict[str, Tensor] = {}  # since the epoch began
        self._loss_count = 0
        self._saved_at = time.monotonic()
        self._stop_signal: int | None = None
        self._initial: dict[str, Any] | None = None  # the first state, for `_failure` until there is a checkpoint
        self._finite_names: set[str] = set()

    def fit(self) -> dict[str, float]:
        """Train to the end and evaluate. Raises Interrupted, StoppedEarly or RunFailure."""
        torch.manual_seed(self.loop.seed + 7919 * rank_and_world()[0])
        self.loop.metrics.parent.mkdir(parents=True, exist_ok=True)
        if self._restore():
            if self.main and not self.steps_taken_over:
                print_text(f"resumed at step {self.step:,} of {self.steps:,}")
            self._write_metrics()
        elif rank_and_world()[1] == 1:  # on the CPU: a GPU's memory is for training
            self._initial = tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), self.state_dict())
        numbers = nonfinite.numbers_of(self.task)
        self._finite_names = numbers.keys() - nonfinite.not_finite(numbers.items())
        reporter = Reporter(self.step, self.loop.epochs, self.steps_per_epoch, silent=not self.main)
        with self._noting_signals(), reporter.bar or nullcontext():
            while self.step < self.steps:
                epoch, offset = divmod(self.step, self.steps_per_epoch)
                self._train_epoch(epoch, offset, reporter)
                row = self._end_epoch(epoch)
                reporter.show(self.step, self._status(row["loss"]), permanent=True)
                if self.step < self.steps:
                    self._stop_or_save()
                    self._stop_early()
        self._stop_or_save()  # a signal in the last epoch or its evaluation: nothing more is begun
        self.compressor.at(self.steps)
        last = self.metrics[-1].items()  # the last epoch is always evaluated
        return {name: value for name, value in last if name not in _EPOCH_COLUMNS and not name.startswith("loss")}

    def state_dict(self) -> dict[str, Any]:
        """Return all that training depends on, as tensors and plain values."""
        return {
            "run": self.loop.run,
            "step": self.step,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "loss_count": self._loss_count,
            "sums": self._loss_sums,
            "task": self.task.state_dict(),
            "compressor": self.compressor.state_dict(),
            "memory": self.task.memory(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make `state`, which `state_dict` returned, the present one."""
        self.task.load_state_dict(state["task"])
        self.compressor.load_state_dict(state["compressor"])
        self.task.restore_memory(state["memory"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step, self.seconds, self.metrics = state["step"], state["seconds"], state["metrics"]
        self._loss_sums = {name: total.to(self.device) for name, total in state["sums"].items()}
        self._loss_count = state["loss_count"]
        if self.main:
            torch.set_rng_state(state["random"])
            if state["random_cuda"] and self.device.type == "cuda":
                torch.cuda.set_rng_state_all(state["random_cuda"])

    @contextmanager
    def evaluation_context(self) -> Iterator[None]:
        """Run eagerly, with the seed's random state; operators observe nothing."""
        loop, stance = self.loop, eager() if self.compiled else nullcontext()
        with stance, evaluation_context(self.compressor, self.device, loop.seed, loop.precision):
            yield

    @property
    def _phase(self) -> str:
        return f"phase {self.compressor.timeline.phase(max(0, self.step - 1))}"

    def _restore(self) -> bool:
        """Load the newest checkpoint or the warm start. Raises UserError if it differs."""
        folder = self.loop.checkpoints
        try:
            saved = checkpoint.load_newest(folder)
            if saved is not None and saved.get("run", self.loop.run) != self.loop.run:  # older ones do not say
                raise ValueError("it is of a run with another signature")
            if saved is None and self.warm_start is not None:
                folder = self.warm_start.folder
                saved = self.warm_start.load(self._float_steps, self.optimizers)
                self.steps_taken_over = saved["step"] if saved else 0
            if saved is not None:
                self.load_state_dict(saved)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the newest checkpoint in {folder} does not fit this run ({error}); delete the folder, and the same "
                "command starts afresh"
            ) from error
        return saved is not None

    def _steps(self, epoch: int, offset: int) -> Iterator[dict[str, Tensor]]:
        """Train the steps of an epoch from `offset` on; yield the losses of each."""
        self.task.begin_epoch(epoch)
        self.task.train()
        for batch in self.task.train_batches.epoch(epoch, start=offset):
            if self.step in self._kept_steps:
                self._keep_state()
            self.compressor.at(self.step)
            part, share = share_of(batch)
            set_batch_share(share)
            compiled = self.compiled.step(self.step) if self.compiled else nullcontext()
            with compiled, autocast(self.device, self.loop.precision):
                losses = self.task.train_step(part)
            self.step += 1
            yield losses_of_whole_batch(losses)

    def _train_epoch(self, epoch: int, offset: int, reporter: Reporter) -> None:
        started = time.monotonic()
        for losses in self._steps(epoch, offset):
            for name, loss in losses.items():
                self._loss_sums[name] = self._loss_sums[name] + loss if name in self._loss_sums else loss.clone()
            self._loss_count += 1
            seconds, started = time.monotonic() - started, time.monotonic()
            self.seconds += self.compiled.training_seconds(seconds) if self.compiled else seconds
            if reporter.due() and self.step % self.steps_per_epoch:  # at the end of an epoch it is shown once
                reporter.show(self.step, self._status(self._mean_loss()))
            if self.step % self.steps_per_epoch:  # at the end of an epoch it is evaluated and logged first
                self._stop_or_save()

    def _end_epoch(self, epoch: int) -> dict[str, Any]:
        """Evaluate, log and save at the end of an epoch; return the epoch's row."""
        last = epoch + 1 == self.loop.epochs
        loss = self._mean_loss()
        phase = self.compressor.timeline.phase(self.step - 1)  # that of the last step that was trained
        row: dict[str, Any] = {"epoch": epoch + 1, "step": self.step, "phase": phase}
        row |= {f"{kind}_sparsity": value for kind, value in self.compressor.sparsity.items()}
        row |= {"learning_rate": next(iter(self.optimizers.values())).param_groups[0]["lr"], "loss": loss}
        if len(self._loss_sums) > 1:
            row |= {f"loss_{name}": float(total) / self._loss_count for name, total in self._loss_sums.items()}
        if last or (epoch + 1) % self.loop.evaluate_every == 0:
            row |= self._evaluate()
        self._loss_sums, self._loss_count = {}, 0
        self.metrics.append(row)
        self._write_metrics()
        apart = min(self.loop.checkpoint_seconds_apart, 60 * self.loop.checkpoint_minutes)
        recent = time.monotonic() - self._saved_at < apart
        if last or not any_rank(recent, self.device):
            self._save()
        if self.warm_start is not None and self.step in self._shared_steps:
            self._require_finite()
            self.warm_start.save(self.state_dict(), self.optimizers)
        return row

    def _require_folder(self) -> None:
        """Raise RunFailure where the run's folder is gone: it would be made again, without what it held."""
        if not (folder := self.loop.metrics.parent).is_dir():
            raise explained(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), folder)

    @property
    def curve(self) -> bytes:
        """The content of metrics.csv."""
        return pd.DataFrame(self.metrics).to_csv(index=False).encode()

    def _write_metrics(self) -> None:
        if self.main:
            self._require_folder()
            write_atomically(self.loop.metrics, self.curve)

    def _evaluate(self) -> dict[str, float]:
        """Return the task's metrics with rank 0's norms; training is not changed."""
        take_from_first_rank(self.task)
        self._require_finite()
        with self.evaluation_context(), nonfinite.watched_evaluation(self.task.network) as good:
            metrics = self.task.evaluate()
        bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
        # A picture or a class that is made of NaN may score all the same.
        layers = (nonfinite.readable(name) or "the network" for name, is_good in good.items() if not is_good)
        bad += [f"the output of {layer} is not finite" for layer in layers]
        if bad:
            raise RunFailure(f"{bad[0]} in the evaluation after step {self.step} ({self._phase}); no row is written")
        return metrics

    def _status(self, loss: float) -> str:
        scores = [f"{row[self.task.metric]:.3f}" for row in self.metrics if self.task.metric in row]
        zeros = ", ".join(f"{kind[0]} {value:.1%}" for kind, value in self.compressor.sparsity.items() if value > 0)
        text = f"loss {loss:.4g}  {self.task.metric} {scores[-1] if scores else '-'}  {self._phase}"
        return f"{text}  zeros {zeros}" if zeros else text

    def _mean_loss(self) -> float:
        """Return the mean loss of the epoch so far. Raises RunFailure if not finite."""
        for name, total in self._loss_sums.items():
            if not math.isfinite(float(total)):
                raise self._failure(f"the loss {name!r} is {float(total)}")
        return sum(float(total) for total in self._loss_sums.values()) / max(1, self._loss_count)

    def _require_finite(self) -> None:
        numbers = nonfinite.numbers_of(self.task).items()
        if bad := nonfinite.not_finite((name, tensor) for name, tensor in numbers if name in self._finite_names):
            raise self._failure(f"{bad[0]} is not finite")

    def _failure(self, what: str) -> RunFailure:
        """Return the error for a number that is not finite, with layer, step and phase.

        The steps since the last good state are trained again to find them: training must not go on after this.
        """
        noticed, last = f"{what} by step {self.step} ({self._phase})", self.step
        if rank_and_world()[1] > 1:  # the other ranks may not have noticed it, and would not train again
            bad = nonfinite.not_finite(nonfinite.numbers_of(self.task).items())
            found = f"; {nonfinite.readable(bad[0])} is not finite" if bad else ""
        else:
            if self._initial is not None:
                self.load_state_dict(self._initial)
            else:
                self._restore()
            print_text(f"{noticed}; the steps from {self.step} on are trained again to find the layer", stderr=True)
            found = nonfinite.trace(self.task, self._finite_names, self._replay(last))
        return RunFailure(
            f"{noticed}{found}; the newest checkpoint is from before; try a lower learning rate or "
            "trainer.precision=float32"
        )

    def _replay(self, last: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Train up to step `last` without saving; yield each step's name and losses."""
        while self.step < last:
            for losses in self._steps(*divmod(self.step, self.steps_per_epoch)):
                yield f"step {self.step} ({self._phase})", losses
                if self.step == last:
                    return

    def _stop_or_save(self) -> None:
        """Stop after a signal, or save when that is due; all ranks agree on it."""
        if rank_and_world()[1] > 1 and self.step % _STEPS_BETWEEN_AGREEMENTS and self.step < self.steps:
            return
        late = time.monotonic() - self._saved_at > 60 * self.loop.checkpoint_minutes
        if any_rank(self._stop_signal is not None, self.device):
            self._save()
            name = signal.Signals(self._stop_signal or signal.SIGTERM).name
            raise Interrupted(
                f"stopped by {name} after step {self.step} of {self.steps}, with everything saved; "
                "the same command goes on from there"
            )
        if any_rank(late, self.device):
            self._save()

    def _stop_early(self) -> None:
        reason = self.loop.watch(self.metrics) if self.loop.watch and self.main else None
        if any_rank(reason is not None, self.device):
            self._save()
            raise StoppedEarly(f"stopped early after step {self.step} of {self.steps}: {reason or 'its watch says so'}")

    def _save(self) -> None:
        self._mean_loss()  # a state that is not finite is never kept
        self._require_finite()
        self.compressor.collect_on_first_rank()
        self._saved_at = time.monotonic()
        if self.main:
            self._require_folder()
            checkpoint.save(self.loop.checkpoints, self.step, self.state_dict())
            self._initial = None

    def _keep_state(self) -> None:
        """Keep the state before an event, for `qprune explain`: networks and windows, no optimizers."""
        self.compressor.collect_on_first_rank()
        if self.main and self.loop.events is not None:
            state = self.state_dict()
            kept = {name: state[name] for name in ("step", "task", "compressor")}
            checkpoint.save(self.loop.events, self.step, kept, kept=None)

    @contextmanager
    def _noting_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT finish the step, and a second SIGINT stop at once.

        A signal that the shell has set to be ignored, as SIGINT in `nohup ... &`, stays ignored.
        """

        def note(number: int, frame: FrameType | None) -> None:
            if self._stop_signal == signal.SIGINT == number:
                raise KeyboardInterrupt
            self._stop_signal = number

        with ExitStack() as handlers:
            with suppress(ValueError):  # not the main thread
                for number in (signal.SIGTERM, signal.SIGINT):
                    if signal.getsignal(number) != signal.SIG_IGN:
                        handlers.callback(signal.signal, number, signal.signal(number, note))
            yield


@contextmanager
def evaluation_context(compressor: Compressor, device: torch.device, seed: int, precision: str) -> Iterator[None]:
    """Compute in `precision` with the seed's random state; operators observe nothing."""
    devices = [device] if device.type == "cuda" else []
    with compressor.evaluating(), torch.random.fork_rng(devices=devices), autocast(device, precision):
        torch.manual_seed(seed)
        yield
