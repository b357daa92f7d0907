"""When a run may be stopped: after its last event, with what finished runs show of how far it still rises."""

import math
import pickle
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from qprune.training.early_stopping import Watch, after, rises


def rows(scores: dict[int, float], steps_per_epoch: int = 10) -> list[dict[str, Any]]:
    return [{"epoch": e, "step": e * steps_per_epoch, "score": s} for e, s in scores.items()]


def test_only_evaluations_behind_the_last_event_count() -> None:
    epochs = [*rows({1: 5.0, 2: 3.0, 3: 4.0}), {"epoch": 4, "step": 40}, *rows({5: math.nan, 6: 4.5})]
    assert after(epochs, "score", 20) == {3: 4.0, 6: 4.5}  # an event at step 20 happens before the step behind epoch 2
    assert after(epochs, "score", 19) == {2: 3.0, 3: 4.0, 6: 4.5}
    assert after(epochs, "other", 0) == {}


def test_the_largest_rise_from_an_epoch_or_a_later_one() -> None:
    one, two = {3: 10.0, 4: 11.0, 5: 12.0}, {3: 5.0, 4: 4.0, 5: 7.0}
    assert rises([one, two], 1) == {3: 3.0, 4: 3.0, 5: 0.0}  # 4 -> 7, though it starts behind epoch 3
    assert rises([one, two], -1) == {3: 0.0, 4: 0.0, 5: 0.0}  # lower is better: both got worse
    assert rises([one], 1) == {}  # one run tells too little
    assert rises([one, {4: 4.0, 5: 7.0}], 1) == {4: 3.0, 5: 0.0}  # epochs that both were evaluated at


def watch(sign: int = 1, **changes: Any) -> Watch:
    """Of a run of 6 epochs with its last event at the end of epoch 2."""
    values = {"rises": {3: 3.0, 4: 2.0, 5: 1.0, 6: 0.0}, "needed": 29.0, "margin": 0.5, "why": "29 is needed"}
    return Watch(metric="score", sign=sign, last_event=20, epochs=6, **(values | changes))


def test_a_run_is_stopped_when_its_optimistic_end_is_not_enough() -> None:
    asked = watch()
    assert asked(rows({1: 1.0, 2: 1.0})) is None  # before the last event
    assert asked(rows({3: 1.0, 4: 1.0})) is None  # two epochs are left, and two before this one was the event
    assert asked(rows({3: 27.5, 4: 27.5, 5: 27.5})) is None  # 27.5 + 1 + 0.5 is just enough
    said = "score may reach 28.4 at its end, and 0.5 is allowed for chance, but 29 is needed"
    assert asked(rows({3: 27.4, 4: 27.4, 5: 27.4})) == said
    assert asked(rows({3: 20.0, 4: 25.4, 5: 26.9})) == said  # rises by 1.5 in its last epoch, and may once more
    assert asked(rows({3: 20.0, 4: 25.0, 5: 26.9})) is None  # by 1.9
    assert asked(rows({3: 27.6, 4: 27.6, 5: 20.0})) is None  # judged by its best score since the event
    assert watch(rises={})(rows({3: 1.0, 4: 1.0, 5: 1.0})) is None  # nothing is known of rises
    down = watch(sign=-1, needed=-60.0)
    assert down(rows({4: 61.5, 5: 61.5})) is None
    assert down(rows({4: 61.6, 5: 61.6})) == said.replace("28.4", "60.6")
    assert pickle.loads(pickle.dumps(asked)) == asked


def test_epochs_without_evaluation_make_the_judgement_more_careful() -> None:
    asked = watch(rises={5: 1.0})
    assert asked(rows({3: 26.5, 5: 27.4})) is not None
    assert asked(rows({3: 25.0, 5: 27.0})) is None  # the rise of two epochs is allowed for the one that is left


@given(
    finished=st.lists(st.lists(st.floats(0, 40), min_size=4, max_size=4), min_size=2, max_size=4),
    mine=st.lists(st.floats(0, 40), min_size=4, max_size=4),
    needed=st.floats(0, 40),
)
def test_under_its_assumption_no_run_is_stopped_that_would_have_been_enough(
    finished: list[list[float]], mine: list[float], needed: float
) -> None:
    """A2: a run that rises no more than finished ones did, or itself before. What is stopped ends too low."""
    curves = [dict(enumerate(scores, 3)) for scores in finished]
    known = rises(curves, 1)
    own = dict(enumerate(mine, 3))
    asked = watch(rises=known, needed=needed, margin=0.0)
    assert asked(rows({3: own[3], 4: own[4]})) is None
    if asked(rows({e: own[e] for e in (3, 4, 5)})) and own[6] - own[5] <= max(known[5], own[5] - own[4]):
        assert own[6] < needed
