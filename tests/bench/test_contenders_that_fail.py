"""A contender or a loop that fails: the table says so, no other line is compared with it, and no process stays."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.loops import EPOCHS_OF_A_TURN, Measured, Setting, Turn, _taking_turns
from bench.rounds import Contender
from bench.steps import _race


def steady() -> Callable[[], Any]:
    return lambda: sum(range(1000))


def failing_from_its_second_process_on(folder: str) -> Callable[[], Any]:
    mark = Path(folder, "made")
    if mark.exists():
        raise ValueError("no room for a second one")
    mark.touch()
    return steady()


def test_a_contender_that_fails_in_one_set_of_processes_has_no_figures(tmp_path: Path) -> None:
    base = Contender("steady", steady)
    failing = Contender("failing", failing_from_its_second_process_on, (str(tmp_path),))
    contenders = [base, failing, Contender("other", steady)]
    text = _race(contenders, {"steady": base}, threads=1, rounds=2, warm=0, in_a_row=1, draws=2)
    assert text.startswith("2 interleaved rounds, in each of 2 sets of processes; ")
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in text.splitlines()[4:]}
    assert lines["failing"][0] == "ValueError: no room for a second one"
    assert not "".join(lines["failing"][1:]).strip("| ")
    assert float(lines["steady"][0].replace(",", "")) > 0
    assert lines["steady"][2] == "1.000 |"
    assert float(lines["other"][2].strip(" |")) > 0


def good_loop(turn: Turn, setting: Setting) -> Measured:
    for _ in range(2 * EPOCHS_OF_A_TURN):
        turn.end_epoch()
    return 1.0, 0.0, 0.0, 2


def bad_loop(turn: Turn, setting: Setting) -> Measured:
    for _ in range(EPOCHS_OF_A_TURN):
        turn.end_epoch()
    raise ValueError("this loop cannot go on")


def test_loops_that_take_turns_are_all_measured() -> None:
    assert _taking_turns({"one": good_loop, "other": good_loop}, Setting(threads=1, real=False)) == dict.fromkeys(
        ("one", "other"), (1.0, 0.0, 0.0, 2)
    )


def test_a_loop_that_fails_ends_the_others() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="the loop 'bad' ended with the error above"):
        _taking_turns({"good": good_loop, "bad": bad_loop}, Setting(threads=1, real=False))
    for process in set(multiprocessing.active_children()) - before:
        process.join(10)
        assert not process.is_alive()
