"""Schedules: times of events in epochs, and the timeline in optimizer steps that they become.

Times follow Appendix B of the paper: t_qw and t_qf are when weights and features begin to be quantized; masks are
chosen at t_p + k * dt_p for k = 1..n (so nothing is pruned at t_p itself). Between events nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from qprune.errors import UserError


def cubic_ramp(k: int, n: int) -> Fraction:
    """Return the fraction of the final sparsity after event k of n: 1 - (1 - k/n)^3 (Zhu and Gupta 2017)."""
    return 1 - (1 - Fraction(k, n)) ** 3


@dataclass(frozen=True)
class Schedule:
    """Times of events in epochs, fractions allowed; None where an operator is not used.

    Args:
        t_qw, t_qf: When weights and features begin to be quantized.
        t_p, dt_p, n: Masks change at t_p + k * dt_p for k = 1..n.
        prune_at: Rising times at which masks change, in place of t_p, dt_p and n.

    Raises:
        UserError: A time is negative, t_p or dt_p is given alone, n < 1, dt_p <= 0, or prune_at does not rise.
    """

    t_qw: float | None = None
    t_qf: float | None = None
    t_p: float | None = None
    dt_p: float | None = None
    n: int = 4
    prune_at: tuple[float, ...] = ()

    @classmethod
    def in_slots(cls, starts: Mapping[str, float], length: float, n: int = 4, targets: str = "wf") -> Schedule:
        """Give each operator its first event at the start of a slot and its last at the end.

        Operators that stand in slots of equal length have the same time to recover in either order.

        Args:
            starts: Start of the slot of `prune` and of `quantize` in epochs; an operator that is absent is not used.
            length: Of each slot, in epochs.
            n: Pruning events, evenly spaced. One alone is at the slot's end.
            targets: What is quantized: weights (w) at the slot's start and features (f) at its end. One alone begins
                at the slot's end.
        """
        if not (math.isfinite(length) and length > 0) or n < 1:
            raise UserError(f"{n} events in slots of {length} epochs; type a number of events >= 1 and a length > 0")
        prune: tuple[float, ...] = ()
        if "prune" in starts:
            prune = tuple(starts["prune"] + length * (k / (n - 1) if n > 1 else 1.0) for k in range(n))
        weights = features = None
        if "quantize" in starts:
            features = starts["quantize"] + length if "f" in targets else None
            weights = starts["quantize"] + (length if features is None else 0.0) if "w" in targets else None
        return cls(t_qw=weights, t_qf=features, n=n, prune_at=prune)

    def __post_init__(self) -> None:
        for name in ("t_qw", "t_qf", "t_p"):
            time = getattr(self, name)
            if time is not None and not (math.isfinite(time) and time >= 0):
                raise UserError(f"{name}={time} is not a time in epochs; type a number >= 0")
        if (self.t_p is None) != (self.dt_p is None):
            raise UserError("t_p and dt_p belong together; give both in epochs, or neither")
        if self.dt_p is not None and not (math.isfinite(self.dt_p) and self.dt_p > 0):
            raise UserError(f"dt_p={self.dt_p} is not a length in epochs; type a number > 0")
        if not isinstance(self.n, int) or self.n < 1:
            raise UserError(f"n={self.n} is not a number of pruning events; type a whole number >= 1")
        if self.prune_at and self.t_p is not None:
            raise UserError("prune_at stands in place of t_p and dt_p; give one of them")
        are_times = all(math.isfinite(time) and time >= 0 for time in self.prune_at)
        if not are_times or list(self.prune_at) != sorted(self.prune_at):
            raise UserError(f"prune_at={self.prune_at} are no rising times in epochs; type numbers >= 0")

    @property
    def prune_times(self) -> tuple[float, ...]:
        """Epochs at which masks change."""
        if self.t_p is None or self.dt_p is None:
            return self.prune_at
        return tuple(self.t_p + k * self.dt_p for k in range(1, self.n + 1))

    @property
    def quantize_times(self) -> tuple[float, ...]:
        """Epochs at which quantization begins, weights before features."""
        return tuple(time for time in (self.t_qw, self.t_qf) if time is not None)

    @property
    def first_event(self) -> float | None:
        """Epoch of the first event, before which training is float; None without events."""
        return min((*self.prune_times, *self.quantize_times), default=None)

    def check(self, order: Sequence[str], epochs: float, overlap: bool = False) -> None:
        """Raise UserError unless the phases stand in `order` (of 'prune' and 'quantize') and end before `epochs`.

        overlap: Whether events of both may fall between each other, in any order.
        """
        times = {"prune": self.prune_times, "quantize": self.quantize_times}
        keys = {"prune": "t_p + n * dt_p", "quantize": "t_qw and t_qf"}
        for step in order:
            if not times[step]:
                raise UserError(f"the order {' then '.join(order)} needs {keys[step]}, and the schedule has none")
            if max(times[step]) >= epochs:
                raise UserError(
                    f"the last {step} event ({keys[step]}) is at epoch {max(times[step]):g}, but training ends "
                    f"at epoch {epochs:g} (in epochs of the recipe); raise epochs or choose earlier times"
                )
        for first, second in pairwise(() if overlap else order):
            if max(times[first]) > min(times[second]):
                raise UserError(
                    f"the order is {first} then {second}, but the last {first} event ({keys[first]}) is at epoch "
                    f"{max(times[first]):g} and the first {second} event ({keys[second]}) at {min(times[second]):g}; "
                    f"move {keys[second]} to {max(times[first]):g} or later, or choose the other order, or order=joint"
                )

    def __str__(self) -> str:
        """Write the events: `weights quantized at 230; masks change at 115, 130, 145, 160`."""
        named = (("weights", self.t_qw), ("features", self.t_qf))
        parts = [f"{name} quantized at {time:g}" for name, time in named if time is not None]
        if self.prune_times:
            parts.append(f"masks change at {', '.join(f'{time:g}' for time in self.prune_times)}")
        return "; ".join(parts) or "no events"

    def scaled(self, factor: float) -> Schedule:
        """Return the schedule with every time multiplied by `factor`."""

        def at(time: float | None) -> float | None:
            return None if time is None else time * factor

        prune_at = tuple(time * factor for time in self.prune_at)
        return Schedule(at(self.t_qw), at(self.t_qf), at(self.t_p), at(self.dt_p), self.n, prune_at)

    def in_steps(
        self, steps_per_epoch: int, batch_size: int = 1, window: int = 1, samples_per_epoch: int | None = None
    ) -> Timeline:
        """Convert the schedule to optimizer steps.

        Args:
            steps_per_epoch: Optimizer steps per epoch.
            batch_size: Samples per step.
            window: T, samples observed before an event.
            samples_per_epoch: Samples per epoch, which give the size of its last batch; None: a full batch.

        Returns:
            The timeline.

        Raises:
            UserError: `window` < 1, pruning events coincide, or the samples do not fit the batches.
        """
        whole = steps_per_epoch * batch_size
        last = batch_size if samples_per_epoch is None else batch_size - (whole - samples_per_epoch)
        if window < 1:
            raise UserError(f"window={window} is not a number of samples; type a whole number >= 1")
        if not 0 < last <= batch_size:
            raise UserError(f"{samples_per_epoch} samples do not make {steps_per_epoch} batches of {batch_size}")

        def steps(epochs: float) -> int:
            return math.floor(epochs * steps_per_epoch + 1e-6)  # 0.3 * 10 is 2.9999999999999996

        prune = [steps(time) for time in self.prune_at]
        if len(set(prune)) < len(prune):
            raise UserError(
                f"pruning events at epochs {', '.join(f'{time:g}' for time in self.prune_at)} fall together at "
                f"{steps_per_epoch} steps an epoch; choose times further apart, or train more steps an epoch"
            )
        if self.t_p is not None and self.dt_p is not None:
            start, interval = steps(self.t_p), steps(self.dt_p)
            if interval < 1:
                raise UserError(
                    f"dt_p is {self.dt_p * steps_per_epoch:.2g} of a step at {steps_per_epoch} steps an "
                    "epoch: pruning events would fall together; raise dt_p, or train more steps an epoch"
                )
            prune = [start + k * interval for k in range(1, self.n + 1)]
        return Timeline(
            prune_steps=tuple(prune),
            weight_step=None if self.t_qw is None else steps(self.t_qw),
            feature_step=None if self.t_qf is None else steps(self.t_qf),
            window=window,
            steps_per_epoch=steps_per_epoch,
            batch_size=batch_size,
            last_batch_size=last,
        )


@dataclass(frozen=True)
class Window:
    """One step of an observation window.

    Attributes:
        first: Whether the window begins here.
        samples: Number of leading samples of the step's batch that count.
        batch: Samples of the batch over all ranks.
        steps: Length of the window.
    """

    first: bool
    samples: int
    batch: int
    steps: int


@dataclass(frozen=True)
class Timeline:
    """A schedule in optimizer steps, from 0. An event at step t happens before that step's forward pass.

    Args:
        prune_steps: Steps of the pruning events, rising.
        weight_step, feature_step: First quantized step of weights and features, or None.
        window: T, samples observed before an event.
        steps_per_epoch, batch_size, last_batch_size: How samples fall into steps.
    """

    prune_steps: tuple[int, ...] = ()
    weight_step: int | None = None
    feature_step: int | None = None
    window: int = 1
    steps_per_epoch: int = 1
    batch_size: int = 1
    last_batch_size: int = 1

    def recovery(self, rates: Sequence[float]) -> dict[str, float]:
        """Return what is left of training after the last event of each operator.

        Args:
            rates: Learning rate of every epoch of training.

        Returns:
            `epochs_after_pruning`, `rates_after_pruning`, and likewise of `quantization`: epochs, and the sum of their
            learning rates, in which a part of an epoch counts as such. An operator without events is left out.
        """
        quantize = [step for step in (self.weight_step, self.feature_step) if step is not None]
        found = {}
        for name, events in (("pruning", self.prune_steps), ("quantization", quantize)):
            if events:
                last = max(events) / self.steps_per_epoch
                parts = [min(1.0, max(0.0, epoch + 1 - last)) for epoch in range(len(rates))]
                found[f"epochs_after_{name}"] = len(rates) - last
                found[f"rates_after_{name}"] = sum(rate * part for rate, part in zip(rates, parts, strict=True))
        return found

    def prune_events(self, step: int) -> int:
        """Return the number of pruning events up to and including `step`."""
        return sum(event <= step for event in self.prune_steps)

    def fraction(self, events: int) -> Fraction:
        """Return the fraction of the final sparsity after that many events."""
        return cubic_ramp(events, len(self.prune_steps)) if events else Fraction(0)

    def samples_at(self, step: int) -> int:
        """Return the samples of the global batch at `step`."""
        return self.last_batch_size if (step + 1) % self.steps_per_epoch == 0 else self.batch_size

    def prune_window(self, step: int) -> Window | None:
        """Return what feature pruners observe at `step`: the T samples before the next event, after the last one."""
        for previous, event in pairwise((0, *self.prune_steps)):
            if step < event:
                return self._window(step, previous, event)
        return None

    def quantize_window(self, step: int) -> Window | None:
        """Return what feature quantizers observe at `step`: the T samples before `feature_step`."""
        return None if self.feature_step is None else self._window(step, 0, self.feature_step)

    @property
    def events(self) -> tuple[int, ...]:
        """Steps at which masks or fraction bits change, rising."""
        starts = (self.weight_step, self.feature_step)
        return tuple(sorted({*self.prune_steps, *(step for step in starts if step is not None)}))

    @property
    def first_action(self) -> int | None:
        """First step at which an operator acts or observes, before which training is float, or None."""
        first = self.next_action(-1)
        return None if first == math.inf else int(first)

    def next_action(self, step: int) -> float:
        """Return the first step after `step` that changes an operator's state or observation, or infinity."""
        windows = [*pairwise((0, *self.prune_steps)), *([] if self.feature_step is None else [(0, self.feature_step)])]
        actions = [max(step + 1, self._oldest(*window)[0]) for window in windows if window[1] > step]
        if self.weight_step is not None and self.weight_step > step:
            actions.append(self.weight_step)
        return min(actions, default=math.inf)

    def _window(self, step: int, earliest: int, event: int) -> Window | None:
        if not max(earliest, event - self.window) <= step < event:  # a step holds a sample at least
            return None
        start, samples = self._oldest(earliest, event)
        if step < start:
            return None
        return Window(
            step == start, samples if step == start else self.samples_at(step), self.samples_at(step), event - start
        )

    def _oldest(self, earliest: int, event: int) -> tuple[int, int]:
        """Return the step with which the window of `event` begins, and the samples it contributes.

        Walks back from `event` until T samples are together; the oldest batch gives only what is still missing.
        """
        missing, at, taken = self.window, event, 0
        while missing > 0 and at > earliest:
            at -= 1
            taken = min(missing, self.samples_at(at))
            missing -= taken
        return at, taken

    def phase(self, step: int) -> str:
        """Describe what is active at `step`: `float`, `P 2/4`, `P 4/4 Q(w)`, `Q(w,f) P 1/4`."""
        events = self.prune_events(step)
        pruned = f"P {events}/{len(self.prune_steps)}" if events else ""
        weights = self.weight_step is not None and step >= self.weight_step
        features = self.feature_step is not None and step >= self.feature_step
        targets = ",".join(letter for letter, on in (("w", weights), ("f", features)) if on)
        quantized = f"Q({targets})" if targets else ""
        firsts = [s for s in (self.weight_step, self.feature_step) if s is not None]
        quantized_first = firsts and self.prune_steps and firsts[0] < self.prune_steps[0]
        parts = (quantized, pruned) if quantized_first else (pruned, quantized)
        return " ".join(part for part in parts if part) or "float"
