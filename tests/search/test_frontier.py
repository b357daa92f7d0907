"""The search without training: the front, what is left out and what may not be, the order of runs, and the answer."""

import itertools
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprune.runs.scores import pareto_front
from qprune.search.frontier import FLOAT_BITS, Amount, Known, Point, Question, Search, in_order

BITS, SPARSITIES, ORDERS = (3, 4, 6, 8), (0.0, 0.25, 0.5, 0.75), ("prune_first", "quantize_first")
FLOAT = Point("float", frozenset(), FLOAT_BITS, 0.0, 32e6)


def grid(orders: tuple[str, ...] = ORDERS) -> list[Point]:
    """The float network and all cells; what is not pruned is the same point in all orders."""
    points = [FLOAT]
    for bits, sparsity in itertools.product(BITS, SPARSITIES):
        families = [frozenset(orders)] if sparsity == 0 else [frozenset([order]) for order in orders]
        size, name = bits * (1 - sparsity) * 1e6, f"{bits} {sparsity}"
        points += [Point(f"{'+'.join(sorted(f))} {name}", f, bits, sparsity, size) for f in families]
    return points


def point(points: list[Point], bits: int, sparsity: float, order: str = ORDERS[0]) -> Point:
    [found] = [p for p in points if (p.bits, p.sparsity) == (bits, sparsity) and order in p.families]
    return found


def search(points: list[Point], scores: Mapping[Point, float], question: Question) -> Search:
    return Search(points, {p: Known(scores={0: score}) for p, score in scores.items()}, question)


def carried_out(points: list[Point], truth: Mapping[Point, float], question: Question) -> Search:
    """All runs of a search, one seed each."""
    scores: dict[Point, float] = {}
    for chosen in in_order(points):
        if search(points, scores, question).verdict(chosen) is None:
            scores[chosen] = truth[chosen]
    return search(points, scores, question)


@st.composite
def truths(draw: st.DrawFn) -> dict[Point, float]:
    """Scores that fall with compression in every order, but for noise of at most half the margin (A1)."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    scale = draw(st.sampled_from([0.3, 1.0, 4.0]))
    truth = {FLOAT: 30.0}
    points = sorted(grid()[1:], key=lambda p: (p.sparsity, -p.bits))
    for p in points:
        above = [truth[q] for q in truth if q.is_milder(p)]
        truth[p] = min(above, default=30.0) - scale * rng.random() ** 3
    return {p: score + (0 if p.is_float else rng.uniform(-0.25, 0.25)) for p, score in truth.items()}


LOSSES = st.sampled_from([None, Amount(0.5, False), Amount(1.5, False), Amount(10, True)])
SIZES = st.sampled_from([None, 2e6, 4.5e6])


@given(truth=truths(), max_loss=LOSSES, max_size=SIZES, higher=st.booleans())
def test_what_is_left_out_could_not_have_mattered(
    truth: dict[Point, float], max_loss: Amount | None, max_size: float | None, higher: bool
) -> None:
    """Under A1: the answer is that of the exhaustive search, and so is the front of what is allowed."""
    points = grid()
    truth = {p: score if higher else 60 - score for p, score in truth.items()}
    question = Question(higher, max_loss, max_size, margin=Amount(0.5, False))
    spared, exhaustive = carried_out(points, truth, question), search(points, truth, question)
    assert spared.answer() == exhaustive.answer()
    allowed = [[p for p in s.front() if s.is_allowed(p)] for s in (spared, exhaustive)]
    assert allowed[0] == allowed[1]
    for p in points:
        if p not in spared.finished:
            verdict = spared.verdict(p)
            assert verdict is not None
            if verdict.startswith("dominated"):
                assert exhaustive.dominated_by(p) is not None
            else:
                assert not exhaustive.is_allowed(p)


@given(truth=truths())
def test_the_front_is_that_of_the_figures_and_no_point_on_it_is_beaten(truth: dict[Point, float]) -> None:
    points = grid(ORDERS[:1])
    scores = {p: truth.get(p, 20.0) for p in points}
    for higher in (True, False):
        whole = search(points, scores, Question(higher))
        expected = pareto_front([scores[p] for p in points], [-p.size_bits for p in points], higher)
        assert set(whole.front()) == {points[i] for i in expected}
        for p in points:
            rival = whole.dominated_by(p)
            assert (rival is None) == (p in whole.front())
            if rival is not None:
                assert rival.size_bits <= p.size_bits * 1.001
                assert whole.quality(scores[rival]) >= whole.quality(scores[p])


def test_runs_are_spared_where_scores_fall_steeply() -> None:
    """4 and 3 bits ruin the network, as the mildest model and one at an end show in each order."""
    points = grid()
    truth = {p: 30.0 if p.is_float else 29.9 - p.sparsity - (0 if p.bits > 4 else 10) for p in points}
    done = carried_out(points, truth, Question(True, Amount(1.0, True)))
    assert done.answer() == point(points, 6, 0.0)  # loses 0.1 of 0.3 dB; with a quarter of zeros, 0.35
    assert [(p.bits, p.sparsity) for p in done.finished if p.bits < 6 and ORDERS[0] in p.families] == [
        *((3, 0.0), (3, 0.75), (4, 0.0), (4, 0.5))
    ]
    assert (len(done.finished), len(points)) == (19, 29)


def test_a_verdict_names_what_shows_it() -> None:
    points = grid()
    mild, harsh = point(points, 4, 0.25), point(points, 3, 0.5)
    question = Question(True, Amount(1.0, False), margin=Amount(0.5, False))
    known = {FLOAT: 30.0, mild: 28.6}
    assert search(points, known, question).verdict(harsh) is None  # 0.4 below what is needed: may be chance
    known[mild] = 28.4
    said = "loses too much: {} has score 28.4, and 29 is needed to lose no more than is allowed"
    assert search(points, known, question).verdict(harsh) == said.format(mild.name)
    assert search(points, known, question).verdict(mild) == said.format("it")
    assert search(points, known, question).verdict(point(points, 3, 0.5, ORDERS[1])) is None  # of another order
    assert search(points, known, question).verdict(point(points, 6, 0.5)) is None  # more bits
    rival = point(points, 3, 0.5, ORDERS[1])
    known = {FLOAT: 30.0, mild: 29.0, rival: 29.6}
    said = f"dominated: {mild.name} has score 29, and {rival.name} is no larger and has 29.6"
    assert search(points, known, question).verdict(harsh) == said
    assert search(points, known, question).verdict(rival) is None


def test_sizes_are_judged_before_training() -> None:
    points = grid()
    whole = search(points, {}, Question(True, None, 2e6))
    assert {p.name for p in points if whole.verdict(p) is None and not p.is_float} == {
        p.name for p in points if p.size_bits <= 2e6
    }
    assert whole.verdict(FLOAT) is None  # the reference is always run


def test_nothing_is_judged_by_score_before_the_reference_is_known() -> None:
    points = grid()
    scores = {point(points, 8, 0.0): 10.0, point(points, 3, 0.75): 20.0}
    whole = search(points, scores, Question(True, Amount(1.0, True)))
    assert whole.margin == math.inf
    assert not any(whole.verdict(p) for p in points)


def test_the_margin_grows_with_the_spread_of_seeds() -> None:
    points = grid()
    a, b = point(points, 8, 0.0), point(points, 6, 0.0)
    known = {FLOAT: Known({0: 30.0}), a: Known({0: 29.0, 1: 31.0}), b: Known({0: 28.0, 1: 28.0})}
    found = Search(points, known, Question(True, margin=Amount(1.0, True)))
    assert found.margin == pytest.approx(2 * math.sqrt((2.0 + 0.0) / 2))  # pooled over two points, one freedom each
    known[a] = Known({0: 29.0, 1: 29.01})
    assert Search(points, known, Question(True, margin=Amount(1.0, True))).margin == pytest.approx(0.3)
    assert Search(points, known, Question(False, margin=Amount(0.2, False))).margin == 0.2


def test_a_stopped_run_speaks_for_itself_and_with_a_margin_for_others() -> None:
    points = grid()
    stopped, harsher = point(points, 4, 0.0), point(points, 4, 0.25)
    question = Question(True, Amount(1.0, False), margin=Amount(0.5, False))
    known = {FLOAT: Known({0: 30.0}), stopped: Known(optimistic=28.3)}
    found = Search(points, known, question)
    said = "loses too much: {} was stopped when it could still reach score {}, "
    said += "and 29 is needed to lose no more than is allowed"
    assert found.verdict(stopped) == said.format("it", "28.3")
    assert found.verdict(harsher) is None  # 28.3 + 0.5 is not below 29 - 0.5
    known[stopped] = Known(optimistic=27.9)
    assert Search(points, known, question).verdict(harsher) == said.format(stopped.name, "27.9")
    assert stopped not in found.finished
    assert found.front() == [FLOAT]


def test_the_answer_and_what_comes_close() -> None:
    points = grid(ORDERS[:1])
    a, b, c = point(points, 8, 0.0), point(points, 4, 0.0), point(points, 4, 0.5)
    scores = {FLOAT: 30.0, a: 29.9, b: 29.75, c: 29.6}
    question = Question(True, Amount(1.0, True))
    whole = search(points, scores, question)
    assert whole.answer() == b
    assert whole.close_calls(b) == [c]  # 0.1 short of 29.7, and the margin is 0.3
    assert search(points, scores, Question(True, None, 5e6)).answer() == b  # the best of no more than 5 Mb
    assert search(points, scores, Question(True, Amount(1.0, True), 3e6)).answer() is None
    lower = search(points, {FLOAT: 60.0, a: 59.0, b: 61.0, c: 70.0}, Question(False, Amount(2.0, True)))
    assert lower.answer() == b  # 61 is within 60 + 1.2; lower is better
    assert lower.least_quality == -61.2


def test_the_order_of_runs_begins_with_both_ends_and_the_corners() -> None:
    points = grid(ORDERS[:1])
    ordered = in_order(points)
    assert sorted(p.name for p in ordered) == sorted(p.name for p in points)
    assert [(p.bits, p.sparsity) for p in ordered[:3]] == [(32, 0.0), (8, 0.0), (3, 0.75)]
    assert {(p.bits, p.sparsity) for p in ordered[3:5]} == {(3, 0.0), (8, 0.75)}
    both = in_order(grid())
    ends = [p.families for p in both[:5] if (p.bits, p.sparsity) == (3, 0.75)]
    assert set(ends) == {frozenset([order]) for order in ORDERS}  # families take turns
