"""Scores of finished runs: their units, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence

_UNITS = {"db": ("dB", "dB"), "percent": ("%", "pp")}  # of a score, and of a difference: pp are percentage points


def unit_of_score(metric: str) -> str:
    """Return the unit in the last word of a metric (`psnr_db`: dB), if any."""
    return _UNITS.get(metric.rpartition("_")[2], ("", ""))[0]


def unit_of_difference(metric: str) -> str:
    """Return the unit of a difference of scores: `dB`, `pp`, or nothing."""
    return _UNITS.get(metric.rpartition("_")[2], ("", ""))[1]


def pareto_front(scores: Sequence[float], densities: Sequence[float], higher_is_better: bool) -> list[int]:
    """Return the places of the points that no other one beats, by score.

    To beat is to be at least as good in score and density, and better in one of them: of points that are the same in
    both, none beats another, and the front has all of them or none.
    """
    sign = 1 if higher_is_better else -1
    front: list[int] = []
    densest, last = -math.inf, (math.nan, math.nan)
    for i in sorted(range(len(scores)), key=lambda i: (-sign * scores[i], -densities[i])):
        here = (scores[i], densities[i])
        if here[1] > densest or here == last:  # all before it are at least as good in score
            front.append(i)
            densest, last = here[1], here
    return sorted(front, key=lambda i: scores[i])
