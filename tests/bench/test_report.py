"""Sections are measured one by one, and each replaces itself alone; ratios are those of one round."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import SECTIONS, main
from bench.report import machine, replace_section, table
from bench.rounds import Timing


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


def test_ratios_are_medians_over_rounds() -> None:
    base, other = Timing([10.0, 20.0, 40.0]), Timing([11.0, 24.0, 44.0])
    assert other.against(base) == "1.100"  # of the medians it would be 1.2
    assert Timing([], "no such operator").against(base) == "-"


def test_tables() -> None:
    assert table(["step", "ms"], [["float", "1"]]) == "| step | ms |\n| --- | ---: |\n| float | 1 |"


def test_figures_that_others_disturbed_say_so() -> None:
    assert machine(3.2, 1).endswith("Took 1 s, in which others had 3.2 % of the CPU.")
    assert machine(9.0, 1).endswith("others had 9.0 % of the CPU: **disturbed**, to be measured again.")


def test_an_unknown_section_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "speed"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"'speed' is not a section; give some of {', '.join(SECTIONS)}" in capsys.readouterr().err
