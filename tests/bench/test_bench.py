"""Sections are measured one by one; steps are compared in turns, each pair in a process of its own."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.__main__ import SECTIONS, main, replace_section
from bench.compare import Settings, ratios, table
from bench.tables import measure


def steady() -> Callable[[], None]:
    return lambda: None


def failing() -> Callable[[], None]:
    raise ValueError(f"this step cannot be built in process {os.getpid()}\nfor reasons")


def test_a_section_replaces_itself_and_keeps_the_others_in_order(tmp_path: Path) -> None:
    path, order = tmp_path / "results" / "bench.md", ["first", "second", "third"]
    for name, body in (("third", "| 3 |"), ("first", "old"), ("second", "two\n\nparagraphs"), ("first", "new")):
        replace_section(path, name, name.title(), body, order)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# What training costs\n")
    assert text.split("<!-- ")[1:] == [
        "first -->\n## First\n\nnew\n\n",
        "second -->\n## Second\n\ntwo\n\nparagraphs\n\n",
        "third -->\n## Third\n\n| 3 |\n",
    ]


def test_pairs_are_compared_and_one_that_fails_says_why() -> None:
    pairs = {"steady": (steady, steady), "failing": (steady, failing)}
    lines = ratios(pairs, Settings(threads=1, rounds=2, steps=100), "float").splitlines()
    assert lines[0].startswith("2 turns of 100 steps in 1 processes per line")
    assert lines[2] == "| step | float, ms | it, ms | ratio | middle half |"
    assert all(float(cell.replace(",", "")) > 0 for cell in lines[4].split(" | ")[1:4])
    said = re.fullmatch(
        r"\| failing \| ValueError: this step cannot be built in process (\d+) \|  \|  \|  \|", lines[5]
    )
    assert said is not None
    assert int(said[1]) != os.getpid()


def test_tables() -> None:
    assert table(["step", "ms"], [["float", "1"]]) == "| step | ms |\n| --- | ---: |\n| float | 1 |"


def test_an_unknown_section_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "speed"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"'speed' is not a section; give some of {', '.join(SECTIONS)}" in capsys.readouterr().err


def test_made_up_runs_are_counted_by_the_tables() -> None:
    assert min(measure(5)) > 0  # it fails unless each run is in a table
