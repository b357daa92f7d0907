"""Stopping hopeless runs early: what finished runs show of how far a run still rises, and the watch that uses it.

A run is judged only after its last event, when nothing of the compression is still to come, and when no more epochs are
left than it has trained since. Its optimistic end is its best score since then and the larger one of two rises: its own
over as many epochs as are left (recovery slows down), and the largest that finished runs of the same schedule showed
from that epoch, or a later one, to their end (the learning rate may fall). At least LEAST_RUNS of these must be there,
one of them at least as compressed: the more is taken away, the more there is to recover.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qprune.atomic_write import write_json
from qprune.config.schema import RunConfig
from qprune.errors import UserError

LEAST_RUNS = 2
STOPPED_FILE = "stopped.json"


@dataclass(frozen=True)
class Watch:
    """Asked at the end of each epoch whether a run goes on. It holds plain values, so that it reaches other processes.

    metric: the score's key in an epoch's row; sign: 1, or -1 where lower is better. last_event: in steps; rows of
    before are not looked at. rises: see `rises`. needed: quality (sign * score) that the optimistic end, and `margin`,
    must reach. why: for people, what needs so much. epochs: length of the run.
    """

    metric: str
    sign: int
    last_event: int
    epochs: int
    rises: Mapping[int, float]
    needed: float
    margin: float
    why: str

    def __call__(self, epochs: Sequence[Mapping[str, Any]]) -> str | None:
        """The reason to stop, or None. epochs: the rows of metrics.csv so far."""
        if (optimistic := self.optimistic(epochs)) is None or optimistic + self.margin >= self.needed:
            return None
        best = self.sign * optimistic
        return (
            f"{self.metric} may reach {best:.4g} at its end, and {self.margin:.2g} is allowed for chance, but "
            f"{self.why}"
        )

    def optimistic(self, epochs: Sequence[Mapping[str, Any]]) -> float | None:
        """The quality that the run may still reach, but for the margin; None where that is not known."""
        curve = after(epochs, self.metric, self.last_event)
        now = max(curve, default=0)
        before = [epoch for epoch in curve if epoch <= now - (self.epochs - now)]
        if not before or now not in self.rises:
            return None
        best = max(self.sign * score for score in curve.values())
        return best + max(self.rises[now], best - self.sign * curve[max(before)])


def after(epochs: Sequence[Mapping[str, Any]], metric: str, last_event: int) -> dict[int, float]:
    """Score by epoch of the evaluations behind the last event, which happened before the forward pass of its step."""
    return {
        int(row["epoch"]): float(row[metric])
        for row in epochs
        if row["step"] > last_event and metric in row and math.isfinite(row[metric])
    }


def rises(curves: Sequence[Mapping[int, float]], sign: int) -> dict[int, float]:
    """By epoch: the largest rise in quality, at least 0, that a curve shows from there or from later to its end.

    curves: scores by epoch of finished runs, of one schedule, see `after`. Empty with fewer than LEAST_RUNS.
    """
    if len(curves) < LEAST_RUNS:
        return {}
    found: dict[int, float] = {}
    largest = 0.0
    for epoch in sorted(set.intersection(*map(set, curves)), reverse=True):
        largest = max(largest, *(sign * (curve[max(curve)] - curve[epoch]) for curve in curves))
        found[epoch] = largest
    return found


def last_event(config: RunConfig, steps_per_epoch: int) -> int:
    """The step of the last event of the run of a config; 0 without any."""
    from qprune.config.build import Recipe  # late: it imports torch, which bad input need not wait for

    timeline = Recipe.from_config(config).schedule.in_steps(steps_per_epoch)
    events = (*timeline.prune_steps, timeline.weight_step, timeline.feature_step)
    return max((event for event in events if event is not None), default=0)


def rows_of(curve: pd.DataFrame | None) -> list[dict[str, Any]]:
    """A stored curve as the rows that a watch is given; epochs that were not evaluated hold NaN."""
    if curve is None or not {"epoch", "step"} <= set(curve.columns):
        return []
    return [{str(key): value for key, value in row.items()} for row in curve.to_dict("records")]


def note_stopped(folder: Path, reason: str, optimistic: float) -> None:
    """Leave a note in the folder of a run that was stopped; optimistic: score, see `Watch.optimistic`.

    It is no result: the checkpoints stay, and the run's own command goes on from them.
    """
    write_json(folder / STOPPED_FILE, {"reason": reason, "optimistic_score": optimistic})


def read_stopped(folder: Path) -> tuple[str, float] | None:
    """Reason and optimistic score of the note in a run folder; None without one. UserError for a broken one."""
    path = folder / STOPPED_FILE
    try:
        note = json.loads(path.read_bytes())
        reason, score = str(note["reason"]), float(note["optimistic_score"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the note of a stopped run ({error}); delete it") from error
    return (reason, score) if math.isfinite(score) else None
