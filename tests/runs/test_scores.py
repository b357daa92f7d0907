"""The front against its definition: what no other point beats."""

from hypothesis import given
from hypothesis import strategies as st

from qprune.runs.scores import pareto_front

NUMBERS = st.integers(0, 4)  # few, so that many are the same


@given(points=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12), higher=st.booleans())
def test_it_is_what_no_other_point_beats(points: list[tuple[int, int]], higher: bool) -> None:
    good = [(score if higher else -score, density) for score, density in points]
    expected = {
        i for i, (s, d) in enumerate(good) if not any((t >= s and e >= d) and (t, e) != (s, d) for t, e in good)
    }
    scores = [score for score, _ in points]
    found = pareto_front(scores, [density for _, density in points], higher)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [scores[i] for i in found] == sorted(scores[i] for i in found)
