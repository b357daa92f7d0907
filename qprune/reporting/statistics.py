"""Paired differences over seeds: t intervals, sign flips, equivalence, and Holm's correction over a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qprune.errors import counted

LEVEL = 0.95
LEAST_PAIRS = 6  # with five, no outcome has a two-sided sign-flip p below 2/2^5 = 0.0625
_DRAWS = 9_999  # random sign flips, for more than sixteen pairs


@dataclass(frozen=True)
class Tested:
    """Differences of pairs, tested within a table of comparisons.

    low, high: 95 % t interval of the mean, of this comparison alone; NaN with fewer than two pairs. p_t, p_flip: of
    the paired t test and of the exact sign-flip test, two-sided. p_table: p_t after Holm's correction over the table.
    p_equal: of the two one-sided tests against the margin (TOST), after Holm's correction; NaN without a margin.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p_t: float
    p_flip: float
    p_table: float
    p_equal: float

    @property
    def can_decide(self) -> bool:
        """Whether there are enough pairs for a verdict."""
        return self.pairs >= LEAST_PAIRS

    @property
    def differs(self) -> bool:
        """Whether both tests show that the mean is not zero."""
        return self.can_decide and max(self.p_table, self.p_flip) <= 1 - LEVEL

    @property
    def equal(self) -> bool:
        """Whether the mean is shown to be nearer to zero than the margin."""
        return self.can_decide and self.p_equal <= 1 - LEVEL

    def numbers(self, unit: str) -> str:
        """Write the interval and what the tests give. unit: of the mean, with the space before it."""
        text = f"{self.mean:+.3g}{unit}"
        if self.pairs > 1:
            text += f", 95 % interval {self.low:+.3g} to {self.high:+.3g}"
        text += f", {counted(self.pairs, 'seed')}"
        if self.can_decide:
            text += f"; p = {self.p_t:.2g} (t test), {self.p_table:.2g} (corrected), {self.p_flip:.2g} (sign flips)"
            text += "" if math.isnan(self.p_equal) else f", {self.p_equal:.2g} (equality)"
        return text


UNTESTED = Tested(0, *[math.nan] * 7)


def table_of(comparisons: Sequence[Sequence[float]], margin: float | None = None) -> list[Tested]:
    """Test comparisons that stand in one table. Those of fewer than LEAST_PAIRS pairs get no verdict.

    Args:
        comparisons: Differences of pairs, for each comparison.
        margin: The mean difference that would matter, chosen before the runs; None: equality is not tested.
    """
    decidable = [i for i, values in enumerate(comparisons) if len(values) >= LEAST_PAIRS]
    p_t = {i: t_test(comparisons[i]) for i in decidable}
    p_table = dict(zip(decidable, holm(list(p_t.values())), strict=True))
    p_equal = dict.fromkeys(decidable, math.nan)
    if margin is not None:
        equivalence = holm([equivalence_test(comparisons[i], margin) for i in decidable])
        p_equal = dict(zip(decidable, equivalence, strict=True))
    return [
        Tested(
            len(values),
            float(np.mean(values)) if len(values) else math.nan,
            *t_interval(values),
            p_t.get(i, math.nan),
            sign_flip_test(values) if i in p_t else math.nan,
            p_table.get(i, math.nan),
            p_equal.get(i, math.nan),
        )
        for i, values in enumerate(comparisons)
    ]


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return the two-sided t interval of the mean; NaN with fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * float(stats.sem(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def t_test(values: Sequence[float]) -> float:
    """Return the two-sided p of the paired t test against a mean of zero."""
    return 2 * _beyond(abs(float(np.mean(values))), values)


def equivalence_test(values: Sequence[float], margin: float) -> float:
    """Return the larger p of two one-sided t tests, against -margin and margin (TOST)."""
    return _beyond(margin - abs(float(np.mean(values))), values)


def sign_flip_test(values: Sequence[float]) -> float:
    """Return the two-sided p of a mean of zero when every difference may as well have the other sign.

    Exact for up to sixteen values, without any assumption but symmetry; of more, 9,999 seeded draws.
    """
    tested = stats.permutation_test(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        permutation_type="samples",
        n_resamples=2**16 if len(values) <= 16 else _DRAWS,
        batch=1024,  # all draws of 2,000 pairs at once would take gigabytes
        rng=np.random.default_rng(0),
    )
    return float(tested.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values after Holm's correction (1979), in their order: the step-down form of Bonferroni's."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def _beyond(distance: float, values: Sequence[float]) -> float:
    """Return the probability that the mean's t is as far beyond its expectation as `distance`."""
    error = float(stats.sem(values))
    ratio = distance / error if error else math.copysign(math.inf, distance) if distance else 0.0
    return float(stats.t.sf(ratio, len(values) - 1))
