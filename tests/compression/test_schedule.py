"""Ramp, events, windows and the checks on order."""

import math
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qprune.compression.schedule import Schedule, Timeline, cubic_ramp
from qprune.errors import UserError

CIFAR = Schedule(t_qw=230, t_qf=235, t_p=100, dt_p=15, n=4)


def test_the_papers_ramp() -> None:
    assert [round(0.5 * cubic_ramp(k, 4), 4) for k in (1, 2, 3, 4)] == [0.2891, 0.4375, 0.4922, 0.5]


def test_events_of_cifar_in_steps() -> None:
    timeline = CIFAR.in_steps(391, 128, 2048, 50_000)
    assert timeline.prune_steps == (115 * 391, 130 * 391, 145 * 391, 160 * 391)
    assert (timeline.weight_step, timeline.feature_step) == (230 * 391, 235 * 391)
    assert timeline.last_batch_size == 80
    assert [timeline.prune_events(step) for step in (115 * 391 - 1, 115 * 391, 10**6)] == [0, 1, 4]


@pytest.mark.parametrize("epochs", [0.3, 2.9, 0.7])
def test_times_are_not_cut_by_floating_point(epochs: float) -> None:
    assert Schedule(t_qw=epochs).in_steps(10).weight_step == round(epochs * 10)


def test_phases_are_named() -> None:
    timeline = CIFAR.in_steps(10)
    steps = (0, 1150, 1600, 2300, 2350)
    assert [timeline.phase(s) for s in steps] == ["float", "P 1/4", "P 4/4", "P 4/4 Q(w)", "P 4/4 Q(w,f)"]
    late = Schedule(t_qw=160, t_qf=170, t_p=180, dt_p=15, n=4).in_steps(1)
    assert [late.phase(s) for s in (165, 170, 195)] == ["Q(w)", "Q(w,f)", "Q(w,f) P 1/4"]


@given(
    window=st.integers(1, 70),
    batch=st.integers(1, 20),
    steps_per_epoch=st.integers(1, 6),
    missing=st.integers(0, 19),
    event=st.integers(1, 30),
)
def test_the_window_is_the_last_samples_before_the_event(
    window: int, batch: int, steps_per_epoch: int, missing: int, event: int
) -> None:
    last = batch - missing % batch
    timeline = Timeline(
        feature_step=event, window=window, steps_per_epoch=steps_per_epoch, batch_size=batch, last_batch_size=last
    )
    # The authors' deque of samples, fed batch by batch; from a batch that does not fit whole, leading samples count.
    remembered: deque[int] = deque(maxlen=window)
    for step in range(event):
        remembered.extend([step] * timeline.samples_at(step))
    seen: dict[int, int] = {}
    for step in range(event + 3):
        found = timeline.quantize_window(step)
        if found is not None:
            assert found.first == (not seen)
            seen[step] = found.samples
    assert seen == {step: remembered.count(step) for step in sorted(set(remembered))}
    assert all(timeline.quantize_window(s).steps == len(seen) for s in seen)  # type: ignore[union-attr]


def test_a_pruning_window_never_reaches_beyond_the_event_before() -> None:
    timeline = Schedule(t_p=0, dt_p=2, n=3).in_steps(2, batch_size=4, window=1000)
    assert timeline.prune_steps == (4, 8, 12)
    firsts = [step for step in range(14) if (w := timeline.prune_window(step)) is not None and w.first]
    assert firsts == [0, 4, 8]
    assert timeline.prune_window(12) is None


@pytest.mark.parametrize(
    ("schedule", "order", "epochs", "text"),
    [
        (CIFAR, ("quantize", "prune"), 250, "the order is quantize then prune, but the last quantize event"),
        (
            CIFAR,
            ("prune", "quantize"),
            235,
            "the last quantize event (t_qw and t_qf) is at epoch 235",
        ),
        (
            Schedule(t_p=1, dt_p=1),
            ("prune", "quantize"),
            9,
            "needs t_qw and t_qf, and the schedule has",
        ),
    ],
)
def test_contradictions_are_refused(schedule: Schedule, order: tuple[str, ...], epochs: int, text: str) -> None:
    with pytest.raises(UserError) as error:
        schedule.check(order, epochs)
    assert text in str(error.value)


def test_quantization_may_begin_with_the_last_pruning_event() -> None:
    Schedule(t_qw=160, t_qf=170, t_p=140, dt_p=5, n=4).check(("prune", "quantize"), 200)  # ESPCN, spec 3.2


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"n": 0}, "n=0 is not a number of pruning events; type a whole number >= 1"),
        ({"t_p": 1}, "t_p and dt_p belong together"),
        ({"t_p": 1, "dt_p": 0}, "dt_p=0 is not a length in epochs; type a number > 0"),
        ({"prune_at": (2, 1)}, "prune_at=(2, 1) are no rising times in epochs; type numbers >= 0"),
        ({"prune_at": (2,), "t_p": 1, "dt_p": 1}, "prune_at stands in place of t_p and dt_p; give one of them"),
        ({"t_qw": -1}, "t_qw=-1 is not a time in epochs; type a number >= 0"),
    ],
)
def test_impossible_times_are_refused(values: dict[str, float], text: str) -> None:
    with pytest.raises(UserError) as error:
        Schedule(**values)  # type: ignore[arg-type]
    assert text in str(error.value)


def test_events_that_fall_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"^dt_p is 0.1 of a step at 10 steps an epoch"):
        Schedule(t_p=1, dt_p=0.01).in_steps(10)


def test_scaling_moves_every_time() -> None:
    assert CIFAR.scaled(0.5) == Schedule(t_qw=115, t_qf=117.5, t_p=50, dt_p=7.5, n=4)
    slots = Schedule.in_slots({"prune": 10, "quantize": 20}, length=6)
    assert slots.scaled(0.5) == Schedule.in_slots({"prune": 5, "quantize": 10}, length=3)


def test_operators_in_a_slot_begin_and_end_together() -> None:
    first, second = (Schedule.in_slots(starts, 6, n=4) for starts in ({"prune": 10}, {"quantize": 10}))
    assert [*first.prune_times] == [10, 12, 14, 16]
    assert [*second.quantize_times] == [10, 16]
    assert Schedule.in_slots({"prune": 10}, 6, n=1).prune_times == (16,)
    assert [Schedule.in_slots({"quantize": 10}, 6, targets=t).quantize_times for t in ("w", "f")] == [(16,), (16,)]


def test_events_of_a_slot_are_rounded_one_by_one() -> None:
    both = [
        Schedule.in_slots({"prune": p, "quantize": q}, 1.5).in_steps(7) for p, q in ((3.5, 5.5), (5.5, 3.5), (3.5, 3.5))
    ]
    assert [timeline.prune_steps for timeline in both] == [(24, 28, 31, 35), (38, 42, 45, 49), (24, 28, 31, 35)]
    assert [(timeline.weight_step, timeline.feature_step) for timeline in both] == [(38, 49), (24, 35), (24, 35)]
    with pytest.raises(UserError, match="10, 10.3333, 10.6667, 11 fall together at 2 steps an epoch"):
        Schedule.in_slots({"prune": 10}, 1).in_steps(2)


def test_recovery_by_hand() -> None:
    timeline = Schedule(t_qw=1, t_qf=2.5, t_p=0, dt_p=1, n=1).in_steps(4)
    assert timeline.recovery([0.1, 0.2, 0.3, 0.4]) == {
        "epochs_after_pruning": 3,
        "rates_after_pruning": pytest.approx(0.9),
        "epochs_after_quantization": 1.5,
        "rates_after_quantization": pytest.approx(0.3 / 2 + 0.4),
    }
    assert Timeline(steps_per_epoch=4).recovery([0.1]) == {}


@pytest.mark.parametrize(
    ("order", "pruning", "quantization"),
    [("prune", (90, 0.914), (15, 0.0047)), ("quantize", (10, 0.0015), (80, 0.644))],
)
def test_the_paper_gives_the_orders_of_cifar_unlike_chances(
    order: str, pruning: tuple[float, float], quantization: tuple[float, float]
) -> None:
    schedule = CIFAR if order == "prune" else Schedule(t_qw=160, t_qf=170, t_p=180, dt_p=15)
    rates = [0.05 * (1 + math.cos(math.pi * epoch / 250)) for epoch in range(250)]
    found = schedule.in_steps(391).recovery(rates)
    assert list(found.values()) == pytest.approx([*pruning, *quantization], rel=0.04)


@given(
    st.sets(st.integers(0, 40), max_size=4),
    st.none() | st.integers(0, 40),
    st.none() | st.integers(0, 40),
    st.integers(1, 60),
    st.integers(1, 7),
    st.integers(0, 45),
)
def test_nothing_changes_before_the_next_action(
    events: set[int], weights: int | None, features: int | None, window: int, steps: int, step: int
) -> None:
    timeline = Timeline(tuple(sorted(events)), weights, features, window, steps, batch_size=4, last_batch_size=3)

    def state(at: int) -> tuple[object, ...]:
        quantized = [start is not None and at >= start for start in (weights, features)]
        return timeline.prune_events(at), *quantized, timeline.prune_window(at), timeline.quantize_window(at)

    changes = [at for at in range(step + 1, 50) if state(at) != state(at - 1) or state(at)[3] or state(at)[4]]
    if timeline.prune_window(step) or timeline.quantize_window(step):
        changes = [step + 1]
    assert timeline.next_action(step) == (changes[0] if changes else float("inf"))
