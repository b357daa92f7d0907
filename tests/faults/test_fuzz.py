"""Configs and files from strangers: each is used as it is meant or refused with a clear error; nothing breaks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qprune.config import signature as identity
from qprune.runs.execute import execute
from tests.faults import fuzzing
from tests.faults.conftest import LONG
from tests.faults.recipes import config_of, small
from tests.faults.test_kills import server
from tests.runs.test_execute import config as toy_config
from tests.training import toy

PLANS = {"espcn": 560, "pix2pix": 120, "cyclegan": 120, "cifar": 40, "faster_rcnn": 40} if LONG else {"espcn": 30}
COMMANDS = 240 if LONG else 10
FILES = 150 if LONG else 10
CHECKPOINTS = 300 if LONG else 10

_TINY = {"pix2pix": ("task.image_size=32", "task.width=4"), "faster_rcnn": ("task.on_synthetic.short_side=96",)}


def in_limits(work: Callable[..., Any], notes: Path, *arguments: Any) -> dict[str, int]:
    """Run a function of `fuzzing` in a process of its own, and return what it counted."""
    process = server.Process(target=fuzzing.in_limits, args=(work, str(notes), *arguments))
    process.start()
    process.join()
    output = (notes / "output.txt").read_text()
    assert process.exitcode == 0, output[-6000:]
    counts: dict[str, int] = json.loads((notes / "counts.json").read_text())
    return counts


def base(task: str) -> dict[str, Any]:
    if task in ("espcn", "cifar", "cyclegan"):
        return config_of(*small(task))
    return config_of(f"task={task}", "data=synthetic", "budget=smoke", *_TINY[task])


@pytest.mark.parametrize("task", PLANS)
def test_a_config_makes_a_plan_or_a_clear_error(task: str, tmp_path: Path, figure: Callable[[str], None]) -> None:
    counts = in_limits(fuzzing.fuzz_configs, tmp_path, {task: base(task)}, task, PLANS[task])
    assert sum(counts.values()) >= PLANS[task]
    assert counts["runs"] > 0
    assert counts["refused"] > 0
    figure(f"{task}: {sum(counts.values())} fuzzed configs, {counts['runs']} planned, the others refused; 0 tracebacks")


def test_a_command_makes_a_plan_or_a_clear_error(tmp_path: Path, figure: Callable[[str], None]) -> None:
    counts = in_limits(fuzzing.fuzz_commands, tmp_path, COMMANDS)
    figure(f"{sum(counts.values())} fuzzed commands, {counts.get('runs', 0)} planned, the others refused; 0 tracebacks")


def test_the_text_of_a_config_makes_a_recipe_or_a_clear_error(tmp_path: Path, figure: Callable[[str], None]) -> None:
    counts = in_limits(fuzzing.fuzz_recipe_file, tmp_path, base("espcn"), FILES)
    figure(f"{sum(counts.values())} mutated config files, {counts.get('runs', 0)} legal all the same; 0 tracebacks")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished toy run."""
    cfg = toy_config(tmp_path_factory.mktemp("trained") / "runs")
    execute(cfg)
    assert fuzzing.check_all(identity.run_folder(cfg)) == []
    return identity.run_folder(cfg)


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(trained, identity.run_folder(toy_config(tmp_path / "runs"))))


@pytest.mark.parametrize(
    "name", ["result.json", "SHA256SUMS", "config.yaml", "metrics.csv", "network.safetensors", "timing.json"]
)
def test_a_changed_file_of_a_run_is_noticed(
    name: str, finished: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    counts = in_limits(fuzzing.fuzz_row, tmp_path / "notes", finished, name, FILES)
    assert counts == {"noticed": counts["noticed"]}
    figure(f"{counts['noticed']} mutations of {name}: 0 crashes, 0 wrong numbers accepted")


def test_a_changed_row_without_checksums_breaks_nothing(
    finished: Path, tmp_path: Path, figure: Callable[[str], None]
) -> None:
    (finished / "SHA256SUMS").unlink()
    counts = in_limits(fuzzing.fuzz_old_row, tmp_path / "notes", finished, FILES)
    figure(
        f"{sum(counts.values())} mutations of a row without checksums: {counts.get('refused', 0)} refused; 0 crashes"
    )


def test_a_changed_checkpoint_is_passed_over(tmp_path: Path, figure: Callable[[str], None]) -> None:
    folder = tmp_path / "run"
    _, _, trainer = toy.prepared(folder)
    trainer.fit()
    shutil.copytree(folder, tmp_path / "copy")
    counts = in_limits(fuzzing.fuzz_checkpoint, tmp_path / "notes", tmp_path / "copy", CHECKPOINTS)
    told = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    figure(f"{sum(counts.values())} mutations of the newest checkpoint: {told}; 0 crashes, 0 wrong numbers accepted")


def test_the_row_of_another_run_is_not_taken_for_this_one_s(finished: Path, tmp_path: Path) -> None:
    other = toy_config(tmp_path / "runs", "seed=1")
    shutil.copytree(finished, identity.run_folder(other))
    with pytest.raises(ValueError, match="is the row of another run, whose signature begins with"):
        execute(other)
    assert OmegaConf.to_container(other)


def test_a_checkpoint_that_strayed_from_another_run_is_refused(tmp_path: Path) -> None:
    _, _, trainer = toy.prepared(tmp_path / "one", run="a")
    trainer.fit()
    _, _, trainer = toy.prepared(tmp_path / "one", run="b")
    with pytest.raises(ValueError, match="does not fit this run .it is of a run with another signature.; delete the"):
        trainer.fit()
