"""`qprune frontier`: what it asks and refuses, the runs that it picks, what it says; and a whole search that trains."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import DictConfig, OmegaConf

from qprune import cli
from qprune.command_line.frontier import next_run, searched, watch_of
from qprune.command_line.frontier_grid import grid_of
from qprune.command_line.frontier_text import density_front
from qprune.errors import RunFailure, StoppedEarly, UserError
from qprune.experiment import run as runner
from qprune.experiment.identity import run_folder
from qprune.experiment.results import Row, read_rows
from qprune.experiment.sizing import Sizer
from qprune.experiment.stopping import note_stopped
from tests.reporting.rows import store_row_of

SMOKE = ["task=espcn", "data=synthetic", "budget=smoke", "trainer.threads=1"]
# The last event is in the middle, so that there are epochs behind it to judge by.
SHORT = ["budget.epochs=12", "budget.steps_per_epoch=6", "budget.test_samples=2"]
EARLY = ["schedule.t_p=40", "schedule.dt_p=10", "schedule.t_qw=90", "schedule.t_qf=100"]
SMALL = ["bits=4,8", "sparsity=0,0.5"]


def scored(cfg: DictConfig) -> float:
    """A made-up PSNR: 30 dB, less 2 for 4 bits, less the sparsity; seeds differ by 0.1 dB."""
    names = str(cfg.order.name)
    bits = 32 if names in ("baseline", "prune_only") else cfg.quantize.bits
    zeros = 0.0 if names in ("baseline", "quantize_only") else cfg.prune.sparsity
    return 30.0 - (2.0 if bits == 4 else 0.0) - zeros + 0.1 * cfg.seed


SIZER = Sizer()


def store(cfg: DictConfig, score: float, **changes: Any) -> Row:
    """Store the row of a run without training, with the size that it would have."""
    footprint = SIZER.footprint(json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True))))
    sizes = {f"{kind}_bits_actual": footprint.size_bits(kind) for kind in ("weight", "feature", "input")}
    return store_row_of(cfg, **({"score": score} | sizes | changes))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are not trained: each stores a row with a made-up score, and its name and seed are noted."""
    names: list[str] = []

    def execute(cfg: DictConfig, wait: bool = False, watch: Any = None) -> None:
        assert wait
        row = store(cfg, scored(cfg))
        names.append(f"{row.notation} {row.seed}")

    monkeypatch.setattr(runner, "execute", execute)
    return names


def table_in(folder: Path) -> pd.DataFrame:
    [path] = (folder / "frontier").glob("*.csv")
    return pd.read_csv(path).set_index("model")


def test_the_help_waits_for_no_torch() -> None:
    code = "import sys; from qprune.command_line.frontier import show; show(['--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert "max_loss=1% or 0.3dB" in done.stdout
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)
    assert re.search(r"\| +hydra$", done.stderr, re.MULTILINE)  # so are modules listed


def test_the_front_of_density_is_marked_among_models_with_a_result() -> None:
    table = pd.DataFrame(
        [(30.0, 8.0, 1), (math.nan, math.nan, 0), (29.0, 9.0, 2), (29.0, 8.0, 1), (30.0, 8.0, 1)],
        columns=["mean", "density_actual", "n"],
    )
    assert density_front(table, higher_is_better=True) == ["yes", "", "yes", "no", "yes"]
    assert density_front(table, higher_is_better=False) == ["no", "", "yes", "no", "no"]


def test_models_that_are_the_same_run_are_one(tmp_path: Path) -> None:
    orders = "order=prune_first,quantize_first"
    grid = grid_of([*SMOKE, "bits=4,32", "sparsity=0,0.5", orders, "seed=range(2)", f"results_dir={tmp_path}"])
    assert {point.name: grid.orders[point] for point in grid.points} == {
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
    assert len(grid.jobs) == 10
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


def test_a_plan_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[str]) -> None:
    keys = [*SMOKE, *SMALL, "max_size=30Mb", "max_loss=0.5dB", f"results_dir={tmp_path / 'runs'}"]
    assert cli.main(["frontier", "--plan", *keys]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "espcn, psnr_db (higher is better): models that no other one beats in size and score, and that lose at most "
        "0.5 dB and are no larger than 30 Mb\n"
    )
    assert "5 models, 5 runs: 0 done, at most 5 left\n" in printed
    assert printed.count("0 of 1  too large\n") == 2  # 8 bits, with and without zeros; the float network is run anyway
    assert not started
    assert not (tmp_path / "runs").exists()


def test_seeds_go_round_by_round_and_only_to_what_is_worth_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], started: list[str]
) -> None:
    keys = [*SMOKE, *SMALL, "seed=range(3)", "max_loss=2%", "margin=0.1dB", f"results_dir={tmp_path}"]
    assert cli.main(["frontier", *keys]) == 0
    assert started == [
        *("Baseline 0", "Q8(w,f) 0", "P0.5(w,f)->Q4(w,f) 0", "Q4(w,f) 0", "P0.5(w,f)->Q8(w,f) 0"),
        *(f"{name} {seed}" for seed in (1, 2) for name in ("Baseline", "Q8(w,f)", "P0.5(w,f)->Q8(w,f)")),
    ]
    table = table_in(tmp_path)
    assert table["n"].to_dict() == {
        "Baseline": 3,
        "Q8(w,f)": 3,
        "P0.5(w,f)->Q8(w,f)": 3,
        "Q4(w,f)": 1,
        "P0.5(w,f)->Q4(w,f)": 1,
    }
    assert table.loc["Q8(w,f)", "mean"] == pytest.approx(30.1)
    assert table.loc["Q8(w,f)", "sd"] == pytest.approx(0.1)
    assert table.loc["Q4(w,f)", "state"] == (
        "dropped after 1 of 3 seeds, loses too much: it has psnr_db 28, and 29.5 is needed to lose no more than is "
        "allowed"
    )
    printed = capsys.readouterr().out
    answer = (
        "answer: the smallest model that loses at most 2 % of the float network's score is P0.5(w,f)->Q8(w,f): 35.48 Mb"
    )
    assert answer in printed
    assert "psnr_db 29.6 +- 0.1 (3 seeds), loses 0.5 dB, 1.66% of 30.1\n" in printed
    assert cli.main(["frontier", *keys]) == 0  # all is known: nothing is run
    assert len(started) == 11
    capsys.readouterr()
    assert cli.main(["frontier", "--finished", *keys]) == 0
    assert answer in capsys.readouterr().out
    assert len(started) == 11
    assert cli.main(["frontier", "--exhaustive", *keys]) == 0
    assert len(started) == 15


def test_lower_scores_may_be_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]) -> None:
    """As FID: the network with 4 bits and half of the weights scores 62.5, and 60 * 1.05 is needed."""
    keys = ["task=cyclegan", *SMOKE[1:], *SMALL, "max_loss=5%", f"results_dir={tmp_path}"]

    def execute(cfg: DictConfig, wait: bool = False, watch: Any = None) -> None:
        store(cfg, 90 - scored(cfg), metric="fid_proxy", higher_is_better=False)

    monkeypatch.setattr(runner, "execute", execute)
    assert cli.main(["frontier", *keys]) == 0
    table = table_in(tmp_path)
    assert table.loc["P0.5(w,f)->Q4(w),Q12(f)", "mean"] == 62.5
    assert (table["allowed"] == "yes").all()
    assert cli.main(["frontier", *keys[:-2], "max_loss=4%", f"results_dir={tmp_path}"]) == 0
    tables = [pd.read_csv(path).set_index("model") for path in (tmp_path / "frontier").glob("*.csv")]
    assert sorted(str(table.loc["P0.5(w,f)->Q4(w),Q12(f)", "allowed"]) for table in tables) == ["no", "yes"]


def test_failed_runs_are_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], started: list[str]
) -> None:
    good = runner.execute

    def failing(order: str) -> Callable[..., Any]:
        def execute(cfg: DictConfig, wait: bool = False, watch: Any = None) -> Any:
            if cfg.order.name == order:
                raise RunFailure("the loss is not finite")
            return good(cfg, wait, watch)

        return execute

    keys = [*SMOKE, *SMALL, f"results_dir={tmp_path}"]
    monkeypatch.setattr(runner, "execute", failing("quantize_only"))
    assert cli.main(["frontier", *keys]) == 1
    printed = capsys.readouterr()
    assert len(started) == 3
    assert printed.err.count("failed: ") == 2
    assert "order=quantize_only quantize.bits=4 seed=0: the loss is not finite\n" in printed.err
    assert table_in(tmp_path).loc["Q4(w,f)", "state"] == "failed"
    monkeypatch.setattr(runner, "execute", failing("baseline"))
    assert cli.main(["frontier", *keys[:-1], f"results_dir={tmp_path / 'other'}"]) == 1
    assert "the float network has failed, and nothing can be compared with it\n" in capsys.readouterr().err
    assert len(started) == 3  # nothing else was run


def test_a_row_of_another_run_is_refused(tmp_path: Path, started: list[str]) -> None:
    words = [*SMOKE, *SMALL, f"results_dir={tmp_path}"]
    grid = grid_of(words)
    job = next(iter(grid.jobs.values()))
    store_row_of(job.config, signature="0" * 64)
    with pytest.raises(UserError, match="is the row of another run; delete it, or run with force=true"):
        searched(grid)


def test_a_stopped_run_is_no_result_and_goes_on_when_more_may_be_lost(tmp_path: Path, started: list[str]) -> None:
    words = [*SMOKE, *SMALL, "max_loss=1%", "margin=0.1dB", f"results_dir={tmp_path}"]
    grid = grid_of(words)
    [point] = [point for point in grid.points if point.name == "Q4(w,f)"]
    store(grid.jobs[grid.points[0], 0].config, 30.0)
    note_stopped(grid.jobs[point, 0].folder, "hopeless", 28.0)
    verdict = searched(grid).verdict(point)
    assert verdict is not None
    assert (verdict.kind, verdict.by) == ("loses too much", point)
    assert not searched(grid).known[point].scores
    patient = grid_of([*words, "max_loss=10%"])
    assert searched(patient).verdict(point) is None
    assert searched(grid_of([*words, "stop=never"])).verdict(point) is None
    store(grid.jobs[point, 0].config, 29.9)  # finished later: the note is history
    assert searched(grid).known[point].optimistic is None
    assert searched(grid).known[point].mean == 29.9


def test_what_is_watched_and_what_is_not(tmp_path: Path, started: list[str]) -> None:
    words = [*SMOKE, *SHORT, *EARLY, "bits=3,4,8", "sparsity=0", "seed=0,1", "max_loss=1%", f"results_dir={tmp_path}"]
    grid = grid_of(words)
    points = {point.name: point for point in grid.points}

    def finish(name: str, seed: int, scores: list[float]) -> None:
        config = grid.jobs[points[name], seed].config
        store(config, scores[-1], epochs=12, steps=72)
        curve = pd.DataFrame({"epoch": range(1, 13), "step": range(6, 73, 6), "psnr_db": [20.0] * 6 + scores})
        curve.to_csv(run_folder(config) / "metrics.csv", index=False)

    finish("Baseline", 0, [30.0] * 6)
    finish("Q8(w,f)", 0, [27.0, 28.0, 29.0, 29.5, 29.8, 30.0])
    assert watch_of(grid, searched(grid), points["Q4(w,f)"]) is None  # none that is finished is as compressed
    finish("Q3(w,f)", 0, [20.0, 22.0, 24.0, 25.0, 26.0, 26.5])
    watch = watch_of(grid, searched(grid), points["Q4(w,f)"])
    assert watch is not None
    assert watch.last_event == 36  # t_qf = 100 of 200 epochs: epoch 6 of 12, of 6 steps each
    assert (watch.epochs, watch.needed, watch.margin) == (12, 29.7, 0.3)
    assert watch.rises == {7: 6.5, 8: 4.5, 9: 2.5, 10: 1.5, 11: 0.5, 12: 0.0}
    assert watch_of(grid, searched(grid), points["Q8(w,f)"]) is None  # a further seed
    assert watch_of(grid, searched(grid), points["Baseline"]) is None
    for free in (grid_of([*words, "stop=never"]), grid_of(words, exhaustive=True)):
        assert watch_of(free, searched(free), points["Q4(w,f)"]) is None
    assert next_run(grid, searched(grid), ()) == ((points["Q4(w,f)"], 0), 0)


def test_a_search_on_espcn_ends_as_the_whole_grid_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained for real: one model is left out and one stopped early; the answer is that of the exhaustive search."""
    keys = [*SMOKE, *SHORT, *EARLY, "bits=3,4,8", "sparsity=0,0.75", "max_loss=3%", f"results_dir={tmp_path}"]
    assert cli.main(["frontier", *keys]) == 0
    printed = capsys.readouterr().out
    table = table_in(tmp_path)
    stopped = [name for name, state in table["state"].items() if state.startswith("stopped early")]
    out = [name for name, state in table["state"].items() if state.startswith("left out")]
    assert (stopped, out) == (["Q4(w,f)"], ["P0.75(w,f)->Q4(w,f)"])
    assert table.loc[stopped + out, "n"].tolist() == [0, 0]
    assert len(read_rows(tmp_path)[0]) == 5
    [note] = tmp_path.rglob("stopped.json")
    assert not (note.parent / "result.json").exists()
    assert any((note.parent / "checkpoints").iterdir())
    assert json.loads(note.read_text())["reason"].startswith("stopped early after step ")
    answer = [line for line in printed.splitlines() if line.startswith("answer: the smallest model that loses")]
    assert len(answer) == 1
    assert [path.suffix for path in sorted((tmp_path / "frontier").iterdir())] == [".csv", ".png", ".svg"]

    assert cli.main(["frontier", *keys]) == 0
    again = capsys.readouterr().out
    assert "next run" not in again
    assert answer[0] in again

    assert cli.main(["frontier", "--exhaustive", *keys]) == 0
    whole = capsys.readouterr().out
    assert whole.count("next run: ") == 2
    assert answer[0] in whole
    assert len(read_rows(tmp_path)[0]) == 7


def test_a_signal_leaves_the_table_and_code_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], started: list[str]
) -> None:
    from qprune.errors import Interrupted

    def execute(cfg: DictConfig, wait: bool = False, watch: Any = None) -> None:
        if cfg.order.name != "baseline":
            raise Interrupted("stopped by SIGTERM")
        store(cfg, 30.0)

    monkeypatch.setattr(runner, "execute", execute)
    assert cli.main(["frontier", *SMOKE, *SMALL, f"results_dir={tmp_path}"]) == 75
    assert table_in(tmp_path)["state"].value_counts().to_dict() == {"1 of 1 runs missing": 4, "done": 1}
    assert "not the last word: runs of 4 models that could matter are missing\n" in capsys.readouterr().out


def test_a_run_that_its_watch_stops_leaves_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    def execute(cfg: DictConfig, wait: bool = False, watch: Any = None) -> None:
        if watch is None:
            score = scored(cfg) if cfg.order.name == "baseline" or cfg.quantize.bits == 8 else 20.0
            row = store(cfg, score, epochs=12, steps=72)
            curve = {"epoch": range(1, 13), "step": range(6, 73, 6), "psnr_db": [row.score] * 12}
            pd.DataFrame(curve).to_csv(run_folder(cfg) / "metrics.csv", index=False)
            return
        curve = pd.DataFrame({"epoch": range(1, 11), "step": range(6, 61, 6), "psnr_db": [25.0] * 10})
        run_folder(cfg).mkdir(parents=True)
        curve.to_csv(run_folder(cfg) / "metrics.csv", index=False)
        reason = watch(curve.to_dict("records"))
        raise StoppedEarly(f"stopped early after step 60 of 72: {reason}")

    monkeypatch.setattr(runner, "execute", execute)
    keys = [*SMOKE, *SHORT, *EARLY, "bits=3,4,8", "sparsity=0", "max_loss=1%", f"results_dir={tmp_path}"]
    assert cli.main(["frontier", *keys]) == 0
    [note] = tmp_path.rglob("stopped.json")
    assert note.parent.name.startswith("quantize_only-Q4wf")
    assert json.loads(note.read_text()) == {
        "optimistic_score": 25.0,
        "reason": (
            "stopped early after step 60 of 72: psnr_db may reach 25 at its end, and 0.3 is allowed for chance, but "
            "29.7 is needed to lose no more than is allowed"
        ),
    }
    assert table_in(tmp_path).loc["Q4(w,f)", "state"] == (
        "stopped early, loses too much: it was stopped when it could still reach psnr_db 25, and 29.7 is needed to "
        "lose no more than is allowed"
    )
