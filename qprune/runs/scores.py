"""Scores of finished runs: their units, and the Pareto front."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from qprune.runs.row import Row

_UNITS = {"db": ("dB", "dB"), "percent": ("%", "pp")}  # of a score, and of a difference: pp are percentage points


def unit_of_score(metric: str) -> str:
    """Return the unit in the last word of a metric (`psnr_db`: dB), if any."""
    return _UNITS.get(metric.rpartition("_")[2], ("", ""))[0]


def unit_of_difference(metric: str) -> str:
    """Return the unit of a difference of scores: `dB`, `pp`, or nothing."""
    return _UNITS.get(metric.rpartition("_")[2], ("", ""))[1]


def scored_by(row: Row, metric: str, density: Callable[[float, float], float]) -> Row:
    """Return a row with another metric of its evaluation as its score. density: the task's."""
    if metric == row.metric:
        return row
    score, others = row.metrics[metric], row.metrics | {row.metric: row.score}
    paper, actual = density(score, row.size_bits("paper")), density(score, row.size_bits("actual"))
    return replace(row, metric=metric, score=score, metrics=others, density_paper=paper, density_actual=actual)


def pareto_front(scores: Sequence[float], densities: Sequence[float], higher_is_better: bool) -> list[int]:
    """Return the places of the points that no other one beats, by score.

    To beat is to be at least as good in score and density, and better in one of them: equal points beat none.
    """
    points = [
        (score if higher_is_better else -score, density) for score, density in zip(scores, densities, strict=True)
    ]
    front = [i for i, (s, d) in enumerate(points) if not any(a >= s and b >= d and (a, b) != (s, d) for a, b in points)]
    return sorted(front, key=lambda i: scores[i])
