"""What is started: one run, or all combinations of a sweep."""

import json
from pathlib import Path
from typing import Any

import pytest

from qprune.cli import main as cli

SMOKE = ("task=espcn", "data=synthetic", "budget=smoke")


def test_a_run_is_started_once_with_what_was_typed(started: list[dict[str, Any]], tmp_path: Path) -> None:
    before = Path.cwd()
    assert cli.main(["run", *SMOKE, "order=quantize_first", "seed=7", f"results_dir={tmp_path}"]) == 0
    assert started == [{"task": "espcn", "order": "quantize_first", "seed": 7}]
    assert Path.cwd() == before
    assert not list(tmp_path.iterdir())


def test_a_sweep_runs_every_combination_and_leaves_nothing(started: list[dict[str, Any]], tmp_path: Path) -> None:
    typed = ["sweep", *SMOKE, "order=baseline,prune_only", "seed=range(2)", f"results_dir='{tmp_path}/a b'"]
    assert cli.main(typed) == 0
    pairs = [(run["order"], run["seed"]) for run in started]
    assert pairs == [("baseline", 0), ("baseline", 1), ("prune_only", 0), ("prune_only", 1)]
    assert not (tmp_path / "a b" / "multirun").exists()


@pytest.mark.parametrize("verb", [["sweep"], ["run", "-m"]])
def test_a_sweep_goes_on_after_failures_and_names_them_all(
    started: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    typed = [*verb, *SMOKE, "order=baseline,prune_only", "seed=13,1", f"results_dir={tmp_path}"]
    assert cli.main(typed) == 1
    printed = capsys.readouterr()
    assert len(started) == 4
    assert printed.out.endswith("4 runs: 2 finished, 2 failed\n")
    command = f"task=espcn data=synthetic budget=smoke order={{}} seed=13 results_dir={tmp_path}"
    failed = [line for line in printed.err.splitlines() if line.startswith("failed: ")]
    reason = "the loss is not finite at step 7"
    assert failed == [f"failed: {command.format(order)}: {reason}" for order in ("baseline", "prune_only")]
    [notes] = (tmp_path / "multirun").iterdir()
    assert json.loads((notes / "job-2.json").read_text(encoding="utf-8"))["exit_code"] == 1


def test_a_sweep_of_one_run_gives_the_reason_of_its_failure_once(
    started: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sweep", *SMOKE, "seed=13", f"results_dir={tmp_path}"]) == 1
    printed = capsys.readouterr()
    assert (printed.out.count("the loss is"), printed.err.count("the loss is")) == (0, 1)
    assert "\n1 run: 0 finished, 1 failed\n" in printed.out
