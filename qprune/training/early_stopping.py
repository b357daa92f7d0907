"""Early stopping: how far a run may still rise, judged by finished runs.

A run is judged only after its last event, and when no more epochs are left than it has trained since. Its optimistic
end is its best score since then and the larger one of two rises: its own over as many epochs as are left (recovery
slows down), and the largest that finished runs of the same schedule showed from that epoch, or a later one, to their
end (the learning rate may fall). At least LEAST_RUNS of these must be there, one of them at least as compressed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

LEAST_RUNS = 2


@dataclass(frozen=True)
class Watch:
    """Decides after each epoch whether a run goes on; plain values, so it pickles."""

    metric: str  # the score's key in an epoch's row
    sign: int  # 1, or -1 where lower is better
    last_event: int  # in steps; rows from before are not looked at
    epochs: int  # length of the run
    rises: Mapping[int, float]  # see `rises`
    needed: float  # quality (sign * score) that the optimistic end and `margin` together must reach
    margin: float  # what may be chance
    why: str  # what needs so much, for people

    def __call__(self, epochs: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the reason to stop, or None, from the rows of metrics.csv so far."""
        if (optimistic := self.optimistic(epochs)) is None or optimistic + self.margin >= self.needed:
            return None
        best = f"{self.metric} may reach {self.sign * optimistic:.4g} at its end"
        return f"{best}, and {self.margin:.2g} is allowed for chance, but {self.why}"

    def optimistic(self, epochs: Sequence[Mapping[str, Any]]) -> float | None:
        """Return the quality that the run may still reach, or None if unknown."""
        curve = after(epochs, self.metric, self.last_event)
        now = max(curve, default=0)
        before = [epoch for epoch in curve if epoch <= now - (self.epochs - now)]
        if not before or now not in self.rises:
            return None
        best = max(self.sign * score for score in curve.values())
        return best + max(self.rises[now], best - self.sign * curve[max(before)])


def after(epochs: Sequence[Mapping[str, Any]], metric: str, last_event: int) -> dict[int, float]:
    """Return score by epoch of the evaluations after the last event."""
    return {
        int(row["epoch"]): float(row[metric])
        for row in epochs
        if row["step"] > last_event and math.isfinite(row.get(metric, math.nan))
    }


def rises(curves: Sequence[Mapping[int, float]], sign: int) -> dict[int, float]:
    """Return, by epoch, the largest rise (at least 0) from there or later to the end.

    `curves` are scores by epoch of finished runs of one schedule, see `after`; fewer than LEAST_RUNS give nothing.
    """
    if len(curves) < LEAST_RUNS:
        return {}
    found, largest = {}, 0.0
    for epoch in sorted(set.intersection(*map(set, curves)), reverse=True):
        largest = max(largest, *(sign * (curve[max(curve)] - curve[epoch]) for curve in curves))
        found[epoch] = largest
    return found


def rows_of(curve: pd.DataFrame | None) -> list[dict[Any, Any]]:
    """Return a stored curve as a watch's rows; epochs not evaluated hold NaN."""
    return [] if curve is None or not {"epoch", "step"} <= set(curve.columns) else curve.to_dict("records")
