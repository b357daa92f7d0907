"""The runs that a search picks, and what it says of them; and a whole search that trains."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qprune.cli import main as cli
from qprune.cli.frontier import searched
from qprune.config.schema import RunConfig
from qprune.errors import Interrupted, RunFailure, UserError
from qprune.runs import execute as runner
from qprune.runs.folder import read_rows
from qprune.search.grid import grid_of
from qprune.search.text import density_front
from tests.cli.frontier.runs import EARLY, SHORT, SMALL, SMOKE, scored, store, table_in
from tests.reporting.rows import store_row_of
from tests.reporting.test_publishing import publish


def test_models_are_chosen_by_the_samples_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test set, on which 4 bits do best here, is only reported."""

    def execute(cfg: RunConfig, wait: bool = False, watch: Any = None) -> None:
        store(cfg, 20.0 + 5 * (cfg.quantize.bits == 4), metrics={"validation_psnr_db": scored(cfg)})

    monkeypatch.setattr(runner, "execute", execute)
    keys = [*SMOKE, "bits=4,8", "sparsity=0", "max_loss=2%", f"results_dir={tmp_path}"]
    assert cli.main(["frontier", *keys, "data.validation=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "answer: the smallest model that loses at most 2 % of the float network's score is Q8(w,f): " in printed
    assert "validation_psnr_db 30 (1 seed)" in printed
    assert "models are chosen by their test score" not in printed
    table = table_in(tmp_path)
    assert table["mean"].to_dict() == {"Baseline": 30.0, "Q8(w,f)": 30.0, "Q4(w,f)": 28.0}
    assert table["test"].to_dict() == {"Baseline": 20.0, "Q8(w,f)": 20.0, "Q4(w,f)": 25.0}
    assert table.loc["Q8(w,f)", "density_actual"] == pytest.approx(30 / math.log(table.loc["Q8(w,f)", "size_mb"]))
    assert cli.main(["frontier", "--plan", *keys]) == 0
    assert (
        "\nmodels are chosen by their test score; data.validation=0.1 holds out training samples"
        in capsys.readouterr().out
    )


def test_seeds_go_round_by_round_to_what_pays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made_up: list[str]
) -> None:
    keys = [*SMOKE, *SMALL, "seed=range(3)", "max_loss=2%", "margin=0.1dB", f"results_dir={tmp_path}"]
    assert cli.main(["frontier", *keys]) == 0
    assert made_up == [
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
    assert "psnr_db 29.6 ± 0.1 (3 seeds), loses 0.5 dB, 1.66% of 30.1\n" in printed
    assert cli.main(["frontier", *keys]) == 0  # all is known: nothing is run
    assert len(made_up) == 11
    capsys.readouterr()
    assert cli.main(["frontier", "--finished", *keys]) == 0
    assert answer in capsys.readouterr().out
    assert len(made_up) == 11
    assert cli.main(["frontier", "--exhaustive", *keys]) == 0
    assert len(made_up) == 15


def test_lower_scores_may_be_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_up: list[str]) -> None:
    """As FID: the network with 4 bits and half of the weights scores 62.5, and 60 * 1.05 is needed."""
    keys = ["task=cyclegan", *SMOKE[1:], *SMALL, "max_loss=5%", f"results_dir={tmp_path}"]

    def execute(cfg: RunConfig, wait: bool = False, watch: Any = None) -> None:
        store(cfg, 90 - scored(cfg), metric="fid_proxy", higher_is_better=False)

    monkeypatch.setattr(runner, "execute", execute)
    assert cli.main(["frontier", *keys]) == 0
    table = table_in(tmp_path)
    assert table.loc["P0.5(w,f)->Q4(w),Q12(f)", "mean"] == 62.5
    assert (table["allowed"] == "yes").all()
    assert cli.main(["frontier", *keys[:-2], "max_loss=4%", f"results_dir={tmp_path}"]) == 0
    tables = [pd.read_csv(path).set_index("model") for path in (tmp_path / "frontier").glob("*.csv")]
    assert sorted(str(table.loc["P0.5(w,f)->Q4(w),Q12(f)", "allowed"]) for table in tables) == ["no", "yes"]


def test_the_front_of_density_is_marked_among_models_with_a_result() -> None:
    table = pd.DataFrame(
        [(30.0, 8.0, 1), (math.nan, math.nan, 0), (29.0, 9.0, 2), (29.0, 8.0, 1), (30.0, 8.0, 1)],
        columns=["mean", "density_actual", "n"],
    )
    assert density_front(table, higher_is_better=True) == ["yes", "", "yes", "no", "yes"]
    assert density_front(table, higher_is_better=False) == ["no", "", "yes", "no", "no"]


def test_failed_runs_are_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made_up: list[str]
) -> None:
    good = runner.execute

    def failing(order: str) -> Callable[..., Any]:
        def execute(cfg: RunConfig, wait: bool = False, watch: Any = None) -> Any:
            if cfg.order.name == order:
                raise RunFailure("the loss is not finite")
            return good(cfg, wait, watch)

        return execute

    keys = [*SMOKE, *SMALL, f"results_dir={tmp_path}"]
    monkeypatch.setattr(runner, "execute", failing("quantize_only"))
    assert cli.main(["frontier", *keys]) == 1
    printed = capsys.readouterr()
    assert len(made_up) == 3
    assert printed.err.count("failed: ") == 2
    assert "order=quantize_only quantize.bits=4 seed=0: the loss is not finite\n" in printed.err
    assert table_in(tmp_path).loc["Q4(w,f)", "state"] == "failed"
    monkeypatch.setattr(runner, "execute", failing("baseline"))
    assert cli.main(["frontier", *keys[:-1], f"results_dir={tmp_path / 'other'}"]) == 1
    assert "the float network has failed, and nothing can be compared with it\n" in capsys.readouterr().err
    assert len(made_up) == 3  # nothing else was run


def test_a_row_of_another_run_is_refused(tmp_path: Path, made_up: list[str]) -> None:
    words = [*SMOKE, *SMALL, f"results_dir={tmp_path}"]
    grid = grid_of(words)
    store_row_of(grid.config(), signature="0" * 64)
    with pytest.raises(UserError, match="is the row of another run; delete it, or run with force=true"):
        searched(grid)


def test_published_rows_count(tmp_path: Path, made_up: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of three published models, one has a row of its own too, which counts; the other two are run."""
    runs = tmp_path / "runs"
    words = [*SMOKE, *SMALL, f"results_dir={runs}"]
    configs = {point.name: config for (point, _), config in grid_of(words).configs.items()}
    for name in ("Baseline", "Q8(w,f)", "Q4(w,f)"):
        store(configs[name], 30.0)
    publish(runs)
    shutil.rmtree(runs)
    store(configs["Q4(w,f)"], 29.0)
    capsys.readouterr()
    assert cli.main(["frontier", "--plan", *words]) == 0
    assert "5 models, 5 runs: 3 done, at most 2 left\n" in capsys.readouterr().out
    assert cli.main(["frontier", "--exhaustive", *words]) == 0
    assert sorted(made_up) == ["P0.5(w,f)->Q4(w,f) 0", "P0.5(w,f)->Q8(w,f) 0"]
    means = table_in(runs)["mean"]
    assert means[["Baseline", "Q8(w,f)", "Q4(w,f)"]].tolist() == [30.0, 30.0, 29.0]


def test_a_signal_leaves_the_table_and_code_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], made_up: list[str]
) -> None:
    def execute(cfg: RunConfig, wait: bool = False, watch: Any = None) -> None:
        if cfg.order.name != "baseline":
            raise Interrupted("stopped by SIGTERM")
        store(cfg, 30.0)

    monkeypatch.setattr(runner, "execute", execute)
    assert cli.main(["frontier", *SMOKE, *SMALL, f"results_dir={tmp_path}"]) == 75
    assert table_in(tmp_path)["state"].value_counts().to_dict() == {"1 of 1 runs missing": 4, "done": 1}
    assert "not final: runs of 4 models that could matter are missing\n" in capsys.readouterr().out


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
