"""What a search is asked: models and their runs, sizes, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from qprune.cli import main as cli
from qprune.runs.folder import read_rows
from qprune.search.grid import grid_of
from tests.cli.frontier.runs import SMALL, SMOKE


def test_the_help_waits_for_no_torch() -> None:
    code = "import sys; from qprune.cli.frontier import show; show(['--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert "max_loss=1% or 0.3dB" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert re.search(r"\| +hydra$", done.stderr, re.MULTILINE)  # so are modules listed


def test_models_that_are_the_same_run_are_one(tmp_path: Path) -> None:
    orders = "order=prune_first,quantize_first"
    grid = grid_of([*SMOKE, "bits=4,32", "sparsity=0,0.5", orders, "seed=range(2)", f"results_dir={tmp_path}"])
    assert {point.name: grid.config(point).order.name for point in grid.points} == {
        "Baseline": "baseline",
        "Q4(w,f)": "quantize_only",
        "P0.5(w,f)": "prune_only",
        "P0.5(w,f)->Q4(w,f)": "prune_first",
        "Q4(w,f)->P0.5(w,f)": "quantize_first",
    }
    families = {point.name: point.families for point in grid.points}
    assert families["Q4(w,f)"] == families["P0.5(w,f)"] == {"prune_first", "quantize_first"}
    assert families["Baseline"] == frozenset()
    assert families["Q4(w,f)->P0.5(w,f)"] == {"quantize_first"}
    assert len(grid.configs) == 10
    sizes = {point.name: point.size_bits for point in grid.points}
    assert sizes["P0.5(w,f)->Q4(w,f)"] == sizes["Q4(w,f)->P0.5(w,f)"] < sizes["Q4(w,f)"] < sizes["Baseline"]


def test_planned_sizes_are_those_of_the_rows(tmp_path: Path) -> None:
    keys = [*SMOKE, "budget.test_samples=1", f"results_dir={tmp_path}"]
    assert cli.main(["run", *keys, "order=quantize_first", "quantize.bits=3", "prune.sparsity=0.75"]) == 0
    [row] = read_rows(tmp_path)[0]
    grid = grid_of([*keys, "order=quantize_first", "bits=3", "sparsity=0.75"])
    [point] = [point for point in grid.points if point.bits == 3]
    assert point.size_bits == row.weight_bits_actual + row.feature_bits_actual + row.input_bits_actual


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bits=1", "bits=1 is not legal; type 2 to 16, or 32 for none"),
        ("sparsity=1", "sparsity=1 is not legal; type 0 <= sparsity < 1"),
        ("seed=-1", "seed=-1 is not legal; type a whole number >= 0"),
        (
            "max_loss=1dbm",
            "max_loss=1dbm is no amount of psnr_db; type max_loss=1% for 1 % of the float network's score",
        ),
        ("margin=-1", "margin=-1 is no amount of psnr_db; type margin=1% for 1 % of the float network's score"),
        ("max_size=20", "max_size=20 is no size; type for example max_size=20Mb (10^6 bits), kb, or in bytes MB or kB"),
        ("stop=erly", "stop='erly' is not one of early, never; did you mean 'early'?"),
        ("order=prune_only", "order=prune_only: a search varies bits and sparsity, and this order has not both"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib: a search picks its runs one after the other"),
        ("force=true", "force=true: a search takes finished runs as they are"),
        ("task.patch=17,9", "task.patch: several values make several float networks"),
        ("quantize.bots=3", "unknown key 'quantize.bots'; did you mean 'quantize.bits'?"),
        ("max_lss=1%", "unknown key 'max_lss'; did you mean 'max_loss'?"),
        ("exhaustive", "qprune frontier takes KEY=VALUE, not 'exhaustive'"),
        ("bits=interval(3,8)", "quantize.bits=interval(3,8) is no list of values"),
    ],
)
def test_bad_input_is_answered(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    assert cli.main(["frontier", *SMOKE, *SMALL, f"results_dir={folder}", words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {said}")
    assert not folder.exists()


def test_a_plan_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], made_up: list[str]) -> None:
    keys = [*SMOKE, *SMALL, "max_size=30Mb", "max_loss=0.5dB", f"results_dir={tmp_path / 'runs'}"]
    assert cli.main(["frontier", "--plan", *keys]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "espcn, psnr_db (higher is better): models that no other one beats in size and score, and that lose at most "
        "0.5 dB and are no larger than 30 Mb\n"
    )
    assert "5 models, 5 runs: 0 done, at most 5 left\n" in printed
    assert printed.count("0 of 1  too large\n") == 2  # 8 bits, with and without zeros; the float network is run anyway
    assert not made_up
    assert not (tmp_path / "runs").exists()
