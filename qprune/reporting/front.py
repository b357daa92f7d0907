"""The Pareto front: which of several models no other one beats."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(scores: Sequence[float], densities: Sequence[float], higher_is_better: bool) -> list[int]:
    """Places of the points that no other one beats, sorted by score; in n log n time.

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
