"""Sweeps: named ones, plans, summaries, launchers, two at once, and one that is killed half-way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import qprune
from qprune.cli import main as cli
from qprune.config.compose import Composer
from qprune.config.schema import RunConfig
from qprune.errors import Interrupted, UserError
from qprune.runs import execute as runner
from qprune.runs.folder import read_rows
from qprune.runs.jobs import expand
from tests.attacks.toys import toy_words
from tests.reporting.rows import store_row

TOY = ["task=espcn", "data=synthetic", "budget=smoke", "budget.steps_per_epoch=12", "trainer.threads=1"]
TOY += ["budget.batch_size=4", "budget.test_samples=1"]


def table_of(folder: Path) -> str:
    [path] = (folder / "sweeps").glob("*.csv")
    return path.read_text(encoding="utf-8")


def test_a_named_sweep_gives_way_to_what_is_typed() -> None:
    order = "order=baseline,prune_first,quantize_first"
    assert expand(["+sweep=table4", "task=espcn"]) == [order, "prune.targets=wf", "seed=range(5)", "task=espcn"]
    assert expand(["sweep=table4", "seed=1"]) == [order, "prune.targets=wf", "seed=1"]


def test_an_unknown_or_broken_sweep_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sweep='tabel4' is not one of .*; did you mean 'table4'?"):
        expand(["+sweep=tabel4"])
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="sweep mine has no list `overrides` of KEY=VALUE"):
        expand(["+sweep=mine"], str(tmp_path))


def test_plan_counts_runs_and_estimates_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*TOY, f"results_dir={tmp_path}"]
    assert cli.main(["plan", *keys, "order=baseline", "seed=0,1"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 runs: 0 done, 2 left\n")
    assert printed.endswith("time left: 2 runs of unknown length: no run of this task and budget is finished\n")
    assert cli.main(["run", *keys, "order=baseline", "seed=0"]) == 0
    [timing] = tmp_path.rglob("timing.json")
    timing.write_text('{"steps": 48, "training_seconds": 600.0}', encoding="utf-8")
    (timing.parent / "SHA256SUMS").unlink()  # which the file does not match now
    capsys.readouterr()
    assert cli.main(["plan", *keys, "order=baseline,prune_first", "seed=range(2)"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 runs: 1 done, 3 left\n")
    assert "order=baseline seed=0  [done]" in printed
    assert "order=prune_first seed=1  [to do, about 10 min]" in printed
    assert printed.endswith("about 30 min of training on one process, from the measured steps of finished runs\n")


def test_an_interrupted_sweep_says_what_is_finished_interrupted_and_not_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(config: RunConfig, wait: bool = False) -> None:
        if config.seed == 1:
            raise Interrupted("stopped by SIGTERM after step 3 of 48, with everything saved")

    monkeypatch.setattr(runner, "execute", execute)
    assert cli.main(["sweep", *TOY, "seed=range(3)", f"results_dir={tmp_path}"]) == 75
    printed = capsys.readouterr().out
    assert printed.endswith("3 runs: 1 finished, 0 failed, 1 interrupted, 1 not started\n")
    assert "\n2 of 3  seed=1  not finished: stopped by SIGTERM after step 3 of 48, with everything saved\n" in printed
    assert "HYDRA" not in printed


def test_a_published_row_counts_as_finished_unless_its_arithmetic_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Composer() as composer:
        for seed, version in ((0, qprune.ARITHMETIC), (1, qprune.ARITHMETIC - 1)):
            words = ["task=espcn", "order=baseline", f"seed={seed}"]
            store_row(composer, words, tmp_path / "published", arithmetic=version)
    keys = ["task=espcn", "order=baseline", "seed=range(3)", f"results_dir={tmp_path / 'runs'}"]
    assert cli.main(["plan", *keys]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("3 runs: 1 done, 2 left\n")
    assert "\n  seed=0  [done]\n  seed=1  [to do]\n" in printed


def test_the_summary_is_written_when_runs_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [*TOY, "order=baseline", "seed=0,1", "task.learning_rate=0.001,1e30", f"results_dir={tmp_path}"]
    assert cli.main(["sweep", *keys]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("4 runs: 2 finished, 2 failed\n")
    assert printed.err.count("failed: ") == 2
    table = pd.read_csv(next((tmp_path / "sweeps").glob("*.csv")))
    assert table[["n", "missing"]].to_numpy().tolist() == [[2, 0], [0, 2]]
    scores = [row.score for row in read_rows(tmp_path)[0]]
    assert table["mean"][0] == pytest.approx(sum(scores) / 2)
    assert table["sd"][0] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)


def started(folder: Path, words: Sequence[str], *options: str) -> subprocess.Popen[str]:
    """Start a sweep of toy runs in a session of its own."""
    command = [sys.executable, "-m", "qprune.cli.main", "sweep", *words, *options, f"results_dir={folder}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    options_of_process: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder.parent, env=environment, start_new_session=True, **options_of_process)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What chooses a sweep of three toy runs."""
    return [*toy_words(tmp_path_factory.mktemp("configs") / "toy"), "seed=range(3)"]


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of that sweep, by the basic launcher in one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.main(["sweep", *words, f"results_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize(
    ("plugin", "options"),
    [
        ("hydra_plugins.hydra_joblib_launcher", ["hydra/launcher=processes"]),
        ("hydra_plugins.hydra_submitit_launcher", ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=2"]),
        ("hydra_plugins.hydra_ray_launcher", ["hydra/launcher=ray_here"]),
    ],
    ids=["processes", "submitit_local", "ray_here"],
)
def test_launchers_make_the_rows_of_the_basic_one(
    plugin: str, options: list[str], words: list[str], whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip(plugin)
    process = started(tmp_path / "runs", [*words[:-1], "seed=0,1"], *options)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "2 runs: 2 finished, 0 failed" in output
    expected = {path.parent.name: path.read_bytes() for path in whole.rglob("result.json")}
    found = {path.parent.name: path.read_bytes() for path in (tmp_path / "runs").rglob("result.json")}
    assert len(found) == 2
    assert found.items() <= expected.items()
    notes = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "runs").rglob("environment.json")]
    commands = [" ".join(note["command"]).replace("False", "false") for note in notes]
    alone = [f"qprune run {' '.join([*words[:-1], f'seed={seed}', f'results_dir={tmp_path}/runs'])}" for seed in (0, 1)]
    assert sorted(commands) == alone


def test_a_launcher_that_cannot_start_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if shutil.which("srun"):
        pytest.skip("this machine is part of a SLURM cluster")
    assert cli.main(["sweep", *TOY, "seed=0,1", "hydra/launcher=slurm", f"results_dir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert 'error: hydra/launcher=slurm started no run: Could not detect "srun"' in error
    assert "bug of qprune" not in error


def test_a_killed_sweep_ends_with_the_table_of_an_uninterrupted_one(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    """Two workers, SIGKILL to all of them after the first row; then two sweeps at once."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    killed = tmp_path / "killed"
    victim = started(killed, words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    deadline = time.monotonic() + 120
    while not list(killed.rglob("result.json")) and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)  # the session that this test started, workers included
    victim.communicate()
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("result.json")}
    assert before
    pair = [started(killed, words) for _ in range(2)]  # one waits for the runs that the other has
    outputs = [process.communicate(timeout=200)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert table_of(killed) == table_of(whole)
    assert len(read_rows(killed)[0]) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was finished was not run again
    # Both sweeps say so of each run; one that was killed behind its last step has none left to train.
    assert "".join(outputs).count("trained in ") <= 2 * (3 - len(before)), outputs
    rows = [[path.read_bytes() for path in sorted(folder.rglob("result.json"))] for folder in (killed, whole)]
    assert rows[0] == rows[1]
