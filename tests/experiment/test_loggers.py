"""Curves in viewers: TensorBoard read back with its own reader, the two services through stand-ins."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qprune.errors import UserError
from qprune.experiment import loggers
from qprune.experiment.loggers import check_logger, log_curve

CURVE = [
    {"epoch": 1, "step": 16, "phase": "float", "loss": 0.5, "psnr_db": float("nan")},
    {"epoch": 2, "step": 32, "phase": "P 1/4", "loss": 0.25, "psnr_db": 20.0},
]


class Recorder:
    """Stands for a run of wandb and for the module mlflow; notes what it is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[dict[str, float], int]] = []
        self.started: dict[str, Any] = {}

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, **options: Any) -> Recorder:
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
    with pytest.raises(UserError, match="logger.name='tensorbord' is not one of .* did you mean 'tensorboard'"):
        check_logger("tensorbord")
