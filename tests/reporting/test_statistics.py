"""Intervals and tests by hand, and what they promise, held in simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from qprune.reporting.statistics import equivalence_test, holm, sign_flip_test, t_interval, t_test, table_of

VALUES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]  # mean 3.5, standard error sqrt(3.5 / 6), t of 5 degrees of freedom 2.5706


def test_the_interval_and_the_t_test_by_hand() -> None:
    half = 2.570582 * math.sqrt(3.5 / 6)
    assert t_interval(VALUES) == pytest.approx((3.5 - half, 3.5 + half), abs=1e-5)
    assert t_test(VALUES) == pytest.approx(stats.ttest_1samp(VALUES, 0).pvalue)
    assert all(math.isnan(end) for end in t_interval([1.0]))
    assert (t_test([0.0] * 6), t_test([0.5] * 6)) == (1.0, 0.0)


@pytest.mark.parametrize("values", [VALUES, [1.0, -2.0, 3.0, 0.5, 4.0, -0.5], [1.0, 1.0, 1.0, 1.0, 1.0, -3.0]])
def test_sign_flips_are_counted_exactly(values: list[float]) -> None:
    sums = [sum(s * v for s, v in zip(signs, values, strict=True)) for signs in itertools.product((1, -1), repeat=6)]
    assert sign_flip_test(values) == sum(abs(each) >= abs(sum(values)) - 1e-9 for each in sums) / 64


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_equivalence_is_two_one_sided_t_tests() -> None:
    values = [value - 3.4 for value in VALUES]
    sides = (
        stats.ttest_1samp(values, -2, alternative="greater").pvalue,
        stats.ttest_1samp(values, 2, alternative="less").pvalue,
    )
    assert equivalence_test(values, 2) == pytest.approx(max(sides))
    assert equivalence_test(values, 0.05) > 0.5  # the mean itself lies outside


def test_a_verdict_needs_six_pairs() -> None:
    five, six, none = table_of([VALUES[:5], VALUES, []])
    assert (none.can_decide, math.isnan(none.mean)) == (False, True)
    assert (five.can_decide, five.differs, math.isnan(five.p_table)) == (False, False, True)
    assert (six.can_decide, six.differs, six.p_flip) == (True, True, 2 / 64)
    assert six.p_table == six.p_t  # the one of five pairs is no comparison of the table
    assert six.numbers(" dB").startswith("+3.5 dB, 95 % interval +1.54 to +5.46, 6 seeds; p = 0.00")


@pytest.mark.parametrize("pairs", [6, 10])
def test_intervals_cover_95_percent(pairs: int) -> None:
    draws = np.random.default_rng(1).normal(0.3, 1.0, (4000, pairs))
    covered = np.mean([low <= 0.3 <= high for low, high in map(t_interval, draws.tolist())])
    assert covered == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("draw", ["normal", "laplace"])
def test_of_tables_without_any_effect_at_most_5_percent_show_one(draw: str) -> None:
    generator = np.random.default_rng(2)
    draws = getattr(generator, draw)(0.0, 1.0, (400, 4, 6))
    wrong = np.mean([any(each.differs for each in table_of(table)) for table in draws.tolist()])
    assert wrong <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_of_differences_of_the_margin_at_most_5_percent_pass_as_none() -> None:
    draws = np.random.default_rng(3).normal(0.5, 0.3, (400, 8))
    wrong = np.mean([table_of([values], margin=0.5)[0].equal for values in draws.tolist()])
    assert 0.01 <= wrong <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)
    small = np.random.default_rng(4).normal(0.0, 0.3, 8).tolist()
    assert table_of([small], margin=0.5)[0].equal
    assert not table_of([small])[0].equal
