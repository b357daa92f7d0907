"""`qprune explain` as it is typed: two real runs, tables and a figure, and what is refused."""

from pathlib import Path

import pandas as pd
import pytest

from qprune.cli import main as cli
from qprune.runs.execute import execute
from tests.cli.errors import error_of
from tests.runs.test_execute import config

KEYS = ("data=synthetic", "budget=smoke", "trainer.threads=1", "trainer.keep_events=true", "budget.batch_size=4")
KEYS = (*KEYS, "budget.test_samples=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Smoke runs of espcn in both orders."""
    folder = tmp_path_factory.mktemp("explained") / "runs"
    for order in ("prune_first", "quantize_first"):
        assert cli.main(["run", "task=espcn", f"order={order}", *KEYS, f"results_dir={folder}"]) == 0
    return sorted(folder.glob("espcn/*_first*"))


def test_two_runs_are_explained(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["explain", "trainer.device=cpu", *map(str, runs)]) == 0  # a key may come before the runs
    printed = capsys.readouterr().out
    assert printed.startswith("A: P0.5(w,f)->Q8(w,f), seed 0: psnr_db ")
    assert " dB, made of:\n" in printed
    for title in ("What the scores are made of", "Events", "Tensors at the end", "Masks at the end"):
        assert f"\n{title}" in printed
    [folder] = (runs[0].parents[1] / "explain").iterdir()
    assert printed.count(str(folder)) == 2
    terms = pd.read_csv(folder / "terms.csv")
    scores = pd.read_csv(folder / "exchanged.csv").set_index(["network", "masks"])["score"]
    assert terms["A"].sum() == pytest.approx(scores["A", "A"])
    assert terms["B"].sum() == pytest.approx(scores["B", "B"])
    assert (folder / "explain.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_different_tasks_are_refused(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    execute(config(runs[0].parents[1]))
    [other] = runs[0].parents[1].glob("toy/*")
    said = error_of(capsys, "explain", str(runs[0]), str(other))
    assert said.startswith(f"{runs[0]} is a run of espcn (psnr_db) and {other} of toy (negative_mse); name two runs")


def test_bad_words_are_named(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert error_of(capsys, "explain", str(runs[0]), str(runs[1]), "bits=8").startswith("'bits=8' is not KEY=VALUE")
