"""Curves in viewers: TensorBoard read back with its own reader, services by stand-ins and, if there, themselves."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from qprune.errors import UserError
from qprune.training import loggers
from qprune.training.loggers import check_logger, log_curve

CURVE = [
    {"epoch": 1, "step": 16, "phase": "float", "loss": 0.5, "psnr_db": float("nan")},
    {"epoch": 2, "step": 32, "phase": "P 1/4", "loss": 0.25, "psnr_db": 20.0},
]


class Recorder:
    """Stands for a run of wandb and for the module mlflow; notes what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int]] = []
        self.started: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, **options: Any) -> Self:
        self.started = options
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((values, step))


def test_tensorboard_shows_the_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_curve("tensorboard", tmp_path, {}, CURVE)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(16, 0.5), (32, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("psnr_db")] == [(32, 20.0)]


EXPECTED = [({"loss": 0.5}, 16), ({"loss": 0.25, "psnr_db": 20.0}, 32)]


def test_wandb_gets_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=recorder.start))  # type: ignore[arg-type]
    log_curve("wandb", tmp_path / "run-1", {"seed": 3}, CURVE)
    assert recorder.lines == EXPECTED
    assert (recorder.started["id"], recorder.started["config"]) == ("run-1", {"seed": 3})


def test_mlflow_gets_the_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    module = SimpleNamespace(
        set_experiment=lambda name: None,
        start_run=recorder.start,
        log_dict=lambda config, name: None,
        log_metrics=recorder.log,
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)  # type: ignore[arg-type]
    log_curve("mlflow", tmp_path / "run-1", {"seed": 3}, CURVE)
    assert recorder.lines == EXPECTED
    assert recorder.started["run_name"] == "run-1"


def test_a_logger_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    check_logger("csv")
    with pytest.raises(UserError, match=r"logger=wandb needs the package wandb; type: pip install 'qprune\[wandb\]'"):
        check_logger("wandb")


def logged_elsewhere(name: str, folder: Path, then: str, **variables: str) -> str:
    """What `then` prints in a process of its own that has logged CURVE; services write on when a process ends."""
    log = f"from pathlib import Path; from qprune.training.loggers import log_curve; nan = float('nan')\n{then}"
    log = log.replace("LOG", f"log_curve({name!r}, Path({str(folder)!r}), {{'seed': 3}}, {CURVE!r})")
    command, there = [sys.executable, "-c", log], os.environ | variables
    done = subprocess.run(command, capture_output=True, text=True, env=there, cwd=folder.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wandb_itself_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run-1"
    folder.mkdir()
    logged_elsewhere("wandb", folder, "LOG", WANDB_MODE="offline", WANDB_SILENT="true")
    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    content = path.read_bytes()
    for text in (b"run-1", b"qprune", b"loss", b"0.25", b"psnr_db", b"20", b"seed"):
        assert text in content


def test_mlflow_itself(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    read = """LOG
import mlflow
client = mlflow.MlflowClient()
[run] = client.search_runs([client.get_experiment_by_name("qprune").experiment_id])
print(run.info.run_name, [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")])
print([file.path for file in client.list_artifacts(run.info.run_id)])
"""
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folder = tmp_path / "run-1"
    printed = logged_elsewhere("mlflow", folder, read, MLFLOW_TRACKING_URI=address)
    assert printed.splitlines()[-2:] == ["run-1 [(16, 0.5), (32, 0.25)]", "['config.json']"]
