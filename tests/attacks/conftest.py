"""Trials drawn at random, counted by kind, and the table of counts that the suite prints at its end.

A kind has `QPRUNE_ATTACKS` trials: few by default, many under `make attacks`. Trial n of a kind draws from a generator
that is seeded with its name and n, so that a trial that fails can be carried out again alone.
"""

import contextlib
import io
import os
import random
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qprune.cli import main as cli
from tests.attacks.hostile import finished_runs

TRIALS = int(os.environ.get("QPRUNE_ATTACKS", "3"))  # per kind
FAULTS = ("tracebacks", "silent differences", "lost rows")


class SilentDifferenceError(Exception):
    """Something is other than it was or should be, and nothing was said."""


class LostRowError(Exception):
    """A row is gone that nothing was wrong with, or nothing names a row that was left out."""


class Answer(NamedTuple):
    """What a command answered."""

    code: int
    out: str
    err: str


def explained(answer: Answer) -> Answer:
    """Return an answer that is no traceback and not explained as a bug, with one of the documented exit codes."""
    for text in (answer.out, answer.err):
        assert "Traceback (most recent call last)" not in text, text
        assert "This is a bug of qprune" not in text, text
    assert answer.code in (0, 1, 2, 75, 130, 143), answer
    assert answer.code == 0 or answer.err.strip() or answer.out.strip(), f"exit code {answer.code} without a word"
    return answer


def verb(*arguments: str) -> Answer:
    """Carry out a command in this process; AssertionError for one that is not explained."""
    written = io.BytesIO(), io.BytesIO()
    with (
        contextlib.redirect_stdout(io.TextIOWrapper(written[0], "utf-8", write_through=True)),
        contextlib.redirect_stderr(io.TextIOWrapper(written[1], "utf-8", "backslashreplace", write_through=True)),
    ):
        code = cli.main(arguments)
        return explained(Answer(code, *(stream.getvalue().decode() for stream in written)))


class Attacks:
    """Carries out trials and records how they ended."""

    def __init__(self, record: Callable[[str, Any], None]) -> None:
        self.record = record

    def run(self, kind: str, trial: Callable[[random.Random], object], trials: int = TRIALS) -> None:
        """Carry out all trials of a kind, and fail the test where one has ended badly.

        Args:
            kind: Name in the table of counts.
            trial: Raises SilentDifferenceError or LostRowError; any other exception counts as a traceback.
            trials: How many; a kind of trials that take seconds each has fewer.
        """
        counts: Counter[str] = Counter()
        said: list[str] = []
        for number in range(trials):
            seed = f"{kind} {number}"
            try:
                trial(random.Random(seed))
            except Exception as error:
                kinds = {SilentDifferenceError: FAULTS[1], LostRowError: FAULTS[2]}
                counts[what := kinds.get(type(error), FAULTS[0])] += 1
                said.append(f"{what}: random.Random({seed!r})\n{''.join(traceback.format_exception(error))}")
        self.record("attack", [kind, trials, *(counts[fault] for fault in FAULTS)])
        assert not said, f"{len(said)} of {trials} trials ended badly; the first ones:\n" + "\n".join(said[:3])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two finished toy runs with pictures, which tests copy."""
    return finished_runs(tmp_path_factory.mktemp("trained") / "runs")


@pytest.fixture(autouse=True)
def _no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `qprune report` join no tables of the paper, which takes half a minute and reads no run."""
    monkeypatch.setattr("qprune.cli.report.presets", lambda *_: {})


@pytest.fixture
def attacks(record_property: Callable[[str, Any], None]) -> Attacks:
    """What carries out the trials of a test."""
    return Attacks(record_property)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if getattr(report, "when", "") == "call"]
    lines = sorted(value for report in called for name, value in report.user_properties if name == "attack")
    if not lines:
        return
    lines.append(["in all", *(sum(line[place] for line in lines) for place in range(1, len(FAULTS) + 2))])
    terminalreporter.section("attacks")
    for line in [["kind", "trials", *FAULTS], *lines]:
        terminalreporter.write_line(f"{line[0]:<60}" + "".join(f"{cell:>20}" for cell in line[1:]))
