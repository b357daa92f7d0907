"""Runs that share a float prefix end as if they had not, to the last bit."""

import json
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from qprune.cli import main as cli
from qprune.compression.schedule import Schedule
from qprune.config import signature as identity
from qprune.config.compose import Composer
from qprune.runs import execute as run
from qprune.training.warm_start import FOLDER, LOCK, steps_to_leave

EQUAL = ("result.json", "network.safetensors", "metrics.csv", "operators.json")
SMALL = ("data=synthetic", "budget=smoke", "budget.steps_per_epoch=10", "budget.batch_size=2", "prune.window=2")


def finished(folder: Path, *overrides: str) -> tuple[dict[str, bytes], int]:
    """The files of a run that must be equal, and the number of steps that it took over from another run."""
    with Composer() as composer:
        cfg = composer.config([*SMALL, *overrides, f"results_dir={folder}"])
    run.execute(cfg)
    place = identity.run_folder(cfg)
    timing = json.loads((place / "timing.json").read_bytes())
    return {name: (place / name).read_bytes() for name in EQUAL}, timing["steps_taken_over"]


@pytest.mark.parametrize(
    ("task", "others"),
    [
        (("task=espcn",), ("prune_first", "baseline", "quantize_only")),
        # it remembers pictures, and has four networks
        (
            ("task=cyclegan", "task.image_size=32", "task.width=4", "task.blocks=1", "task.pool_size=2"),
            ("prune_first",),
        ),
    ],
    ids=["espcn", "cyclegan"],
)
def test_a_warm_start_equals_training_in_full(task: tuple[str, ...], others: tuple[str, ...], tmp_path: Path) -> None:
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    _, taken = finished(shared, *task, "order=quantize_first")
    assert taken == 0
    for order in others:
        recipe = (*task, f"order={order}", "quantize.bits=6", "prune.sparsity=0.25")
        warm, taken = finished(shared, *recipe)
        in_full, none = finished(alone, *recipe, "trainer.warm_start=false")
        assert (taken > 0, none) == (True, 0), order
        assert warm == in_full, order
    assert not (alone / FOLDER).exists()


def test_a_sweep_trains_the_float_part_once(tmp_path: Path) -> None:
    """Whatever begins first: runs leave a warm start for every order and protocol of the sweep."""
    keys = [*SMALL, "budget.epochs=20", "budget.steps_per_epoch=4", "task=espcn", f"results_dir={tmp_path}"]
    orders = "order=quantize_first,prune_first,quantize_only_late,baseline"
    assert cli.main(["sweep", *keys, orders, "protocol=mirrored"]) == 0
    taken = {
        path.parent.name.partition("-")[0]: json.loads(path.read_bytes())["steps_taken_over"] // 4
        for path in tmp_path.rglob("timing.json")
    }
    # Events at 14 and 16 of 20 epochs; a window of 2 samples is one step, so that prune first is float for 13 epochs
    assert taken == {"quantize_first": 0, "prune_first": 13, "quantize_only_late": 14, "baseline": 16}


def test_where_warm_starts_are_left_by_hand() -> None:
    timeline = Schedule(t_qw=9, t_qf=9.5).in_steps(10, batch_size=4, window=8)
    assert steps_to_leave([5, 5.5, 0.1], timeline) == {40, 50}  # two steps are observed before an event


def test_a_float_run_leaves_its_first_half(tmp_path: Path) -> None:
    finished(tmp_path, "task=espcn", "order=baseline")
    _, taken = finished(tmp_path, "task=espcn", "order=quantize_only")
    assert taken == 2 * 10  # of 4 epochs; operators begin at 0.7 of all


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    finished(folder, "task=espcn", "order=quantize_first")
    return folder


@pytest.fixture
def results(trained: Path, tmp_path: Path) -> Path:
    """Results with a run of ESPCN that quantizes first, to go on in."""
    return Path(shutil.copytree(trained, tmp_path / "results"))


@pytest.mark.parametrize("change", ["seed=1", "task.learning_rate=2e-3", "budget.test_samples=3", "force=true"])
def test_what_float_training_depends_on_keeps_runs_apart(change: str, results: Path) -> None:
    _, taken = finished(results, "task=espcn", "order=prune_first", change)
    assert taken == 0


def test_a_damaged_warm_start_is_skipped(results: Path) -> None:
    [path] = (results / FOLDER).rglob("*.pt")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        _, taken = finished(results, "task=espcn", "order=prune_first")
    assert taken == 0


def test_operators_begin_where_the_window_before_the_first_event_does() -> None:
    def first(**times: float) -> int | None:
        return Schedule(**times).in_steps(10, 4, window=6).first_action  # type: ignore[arg-type]

    assert first() is None
    assert first(t_qw=3, t_qf=4) == 30
    assert first(t_qw=5, t_qf=4) == 40 - 2  # 6 samples are two steps of 4
    assert first(t_p=1, dt_p=1) == 20 - 2
    assert first(t_p=1, dt_p=1, t_qw=0) == 0


def test_what_a_killed_writer_left_is_removed_unless_somebody_is_writing(results: Path) -> None:
    [folder] = (results / FOLDER).iterdir()
    left = folder / ".step-000000020-0123456789abcdef.pt.abc.tmp"
    left.write_bytes(b"half")
    with FileLock(folder / LOCK):
        finished(results, "task=espcn", "order=prune_first")
        assert left.exists()
    finished(results, "task=espcn", "order=quantize_only")
    assert not left.exists()
