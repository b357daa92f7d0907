"""`qprune list runs`: states, filters, published rows, and a table that fits 80 columns."""

from pathlib import Path

import pytest
from filelock import FileLock

from qprune.cli import main as cli
from qprune.config.compose import Composer
from qprune.config.signature import run_folder
from tests.cli.errors import error_of
from tests.reporting.rows import store_row


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two finished runs, a published one, and one each that was interrupted, has failed, and is not begun."""
    with Composer() as composer:
        store_row(composer, ["task=espcn", "order=baseline"], tmp_path / "runs", score=32.8)
        store_row(composer, ["task=cifar", "order=baseline"], tmp_path / "runs", metric="top1_percent", score=92.6)
        store_row(composer, ["task=espcn", "order=prune_first", "quantize.bits=4"], tmp_path / "published")
        store_row(composer, ["task=espcn", "order=baseline"], tmp_path / "published", score=31.0)  # there already
        for seed in (1, 2, 3):
            row = store_row(composer, ["task=espcn", f"seed={seed}"], tmp_path / "runs")
            (place,) = tmp_path.glob(f"runs/espcn/*{row.signature[:10]}")
            (place / "result.json").unlink()
            if seed == 1:
                (place / "checkpoints").mkdir()
                (place / "checkpoints" / "step-1.pt").write_bytes(b"")
            if seed == 2:
                (place / "failed.json").write_text('{"reason": "the loss is not finite"}')
    return tmp_path / "runs"


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    """The words of the lines that a command prints."""
    assert cli.main(["list", "runs", *words]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_every_run_has_its_state(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, f"results_dir={results}")
    states = {line[0].partition("-")[0] + line[0][-17:-11].partition("seed")[2]: line[1] for line in lines[1:-2]}
    assert sorted(line[1] for line in lines[1:-2]) == [
        *("failed", "finished", "finished", "interrupted", "published")
    ], states
    assert " ".join(lines[-2]) == "5 runs: 1 interrupted, 1 failed, 2 finished, 1 published"
    assert " ".join(lines[-1]).startswith(f"below {results} and {results.parent / 'published'}; ")
    (espcn,) = [line for line in lines if line[0].startswith("espcn/baseline")]
    assert espcn[1:4] == ["finished", "32.80", "dB"]


def test_filters_are_keys_of_the_config_and_the_state(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, found in {
        "task=cifar": 1,
        "task=espcn state=finished": 1,
        "seed=range(1,3)": 2,
        "quantize.bits=4": 1,
        "order=baseline,quantize_first": 2,
        "budget=smoke": 0,
    }.items():
        lines = lines_of(capsys, f"results_dir={results}", *words.split())
        assert len(lines[1:-2]) == found, words
    assert " ".join(lines[0]) == f"no runs below {results} with budget=smoke"


def test_a_run_in_progress_is_running(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Composer() as composer:
        folder = run_folder(composer.config(["task=espcn", "seed=9", f"results_dir={results}"]))
    folder.mkdir()
    with FileLock(folder / ".lock"):
        assert [line[1] for line in lines_of(capsys, f"results_dir={results}")[1:-2]].count("running") == 1


def test_wrong_states_and_folders_are_named(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = error_of(capsys, "list", "runs", f"results_dir={results}", "state=finishd")
    assert error_of(capsys, "list", "runs", f"results_dir={results}", "quantise.bits=4") == (
        "no run has a key 'quantise.bits' (all keys: qprune run --help); did you mean 'quantize.bits'?"
    )
    assert said.startswith("state='finishd' is not one of running, interrupted, failed, finished, published; did you")
    said = error_of(capsys, "list", "runs", f"results_dir={results / 'a' / 'b'}")
    assert said.startswith(f"there is no folder {results / 'a' / 'b'}")
