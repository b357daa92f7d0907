"""Training curves for viewers: metrics.csv, sent to a logger after training.

A viewer gets the whole curve of a finished run at once: an interrupted and resumed run appears once and without gaps.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qprune.errors import UserError


def check_logger(name: str) -> None:
    """Raise UserError for a logger whose package is not installed; all but csv need the one of their name."""
    if name != "csv" and importlib.util.find_spec(name) is None:
        raise UserError(f"logger={name} needs the package {name}; type: pip install 'qprune[{name}]'")


def log_curve(name: str, folder: Path, config: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
    """Send the epochs of a run to a logger, under the name of the run's folder."""
    senders = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "mlflow": _to_mlflow}
    if name in senders:
        senders[name](folder, config, curve)


def numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of an epoch, but for its own number and step."""
    for name, value in line.items():
        if isinstance(value, int | float) and math.isfinite(value) and name not in ("epoch", "step"):
            yield name, float(value)


def _to_tensorboard(folder: Path, config: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
    from torch.utils.tensorboard.writer import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for line in curve:
            for name, value in numbers(line):
                writer.add_scalar(name, value, global_step=line["step"])


def _to_wandb(folder: Path, config: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
    wandb = importlib.import_module("wandb")
    with wandb.init(project="qprune", id=folder.name, name=folder.name, dir=str(folder), config=dict(config)) as run:
        for line in curve:
            run.log(dict(numbers(line)), step=line["step"])


def _to_mlflow(folder: Path, config: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> None:
    mlflow = importlib.import_module("mlflow")
    mlflow.set_experiment("qprune")
    with mlflow.start_run(run_name=folder.name):
        mlflow.log_dict(dict(config), "config.json")
        for line in curve:
            mlflow.log_metrics(dict(numbers(line)), step=int(line["step"]))
