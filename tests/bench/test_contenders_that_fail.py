"""A contender that fails: the table says so, and no other line is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
