"""Sweeps: named lists of overrides, the runs they make, which are done, how long the rest takes, and their summary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import DictConfig

from qprune.atomic_write import write_atomically
from qprune.config import signature as identity
from qprune.config.compose import compose_checked
from qprune.config.compose_many import Composer, short_hash, yaml_value
from qprune.errors import UserError, one_of
from qprune.runs.row import ROW_FILE, Row, load_row
from qprune.runs.store import read_metrics

GROUP, LOCK = "sweep", ".lock"


@dataclass(frozen=True)
class Job:
    """One run of a sweep. state: `done`, `running`, `interrupted` or `to do`; row: of a finished run."""

    overrides: tuple[str, ...]
    config: DictConfig
    folder: Path
    state: str
    row: Row | None


def is_named_sweep(text: str) -> bool:
    """Whether an override names a list of overrides: +sweep=NAME."""
    return text.lstrip("+").partition("=")[0] == GROUP


def expand(arguments: Sequence[str], config_dir: str | None = None) -> list[str]:
    """The arguments with +sweep=NAME replaced by the overrides of that sweep, but for the keys that are given anyway.

    The files are sweep/NAME.yaml of qprune and below `config_dir`. Raises UserError for an unknown or broken one.
    """
    given = {text.partition("=")[0].lstrip("+") for text in arguments}
    expanded: list[str] = []
    for text in arguments:
        if not is_named_sweep(text):
            expanded.append(text)
            continue
        sources = _files(config_dir)
        name = text.partition("=")[2]
        one_of("sweep", name, sources)
        content = yaml_value(sources[name], f"sweep {name}")
        overrides = content.get("overrides") if isinstance(content, dict) else None
        if not isinstance(overrides, list) or not all(isinstance(o, str) and "=" in o for o in overrides):
            raise UserError(f"sweep {name} has no list `overrides` of KEY=VALUE; see configs/sweep of qprune")
        expanded += [o for o in overrides if o.partition("=")[0].lstrip("+") not in given]
    return expanded


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether some override has several values. Raises UserError for one that cannot be read."""
    with Composer() as composer:
        return any(override.is_sweep_override() for override in composer.parse(overrides))


def jobs_of(overrides: Sequence[str], config_dir: str | None = None) -> list[Job]:
    """The runs that these overrides make, in the sweep's order, and how far each is; a run counts once."""
    compose_checked(overrides, multirun=True, config_dir=config_dir)  # errors with advice
    found: dict[Path, Job] = {}
    with Composer(str(Path(config_dir).resolve()) if config_dir else None) as composer:
        parsed = [override for override in composer.parse(overrides) if not override.key_or_group.startswith("hydra")]
        for batch in BasicSweeper.split_arguments(parsed, max_batch_size=None):
            for words in batch:
                config = composer.config(words)
                folder = identity.run_folder(config)
                found.setdefault(folder, Job(tuple(words), config, folder, *state_of(folder)))
    return list(found.values())


def plan_text(overrides: Sequence[str], config_dir: str | None = None) -> str:
    """The runs of a sweep, which are done, and the time that is left from the measured steps of finished runs."""
    jobs = jobs_of(overrides, config_dir)
    left = _seconds_left(jobs)
    done = sum(job.state == "done" for job in jobs)
    lines = [f"{len(jobs)} runs: {done} done, {len(jobs) - done} left"]
    for job in jobs:
        seconds = left.get(job.folder)
        shown = job.state + ("" if seconds is None else f", about {_duration(seconds)}")
        lines.append(f"  {' '.join(job.overrides)}  [{shown}]")
    if done < len(jobs):
        lines.append(time_left_text(jobs))
    return "\n".join(lines)


def time_left_text(jobs: Sequence[Job]) -> str:
    """The time that the unfinished ones of these runs take, from the measured steps of finished runs."""
    left = _seconds_left(jobs)
    unknown = sum(seconds is None for seconds in left.values())
    seconds = sum(seconds or 0.0 for seconds in left.values())
    text = f"about {_duration(seconds)} of training on one process, from the measured steps of finished runs"
    if unknown:
        text = (f"{text}; and " if seconds else "") + (
            f"{unknown} runs of unknown length: no run of their task and budget is finished"
        )
    return f"time left: {text}"


def summary_text(overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Mean, standard deviation and n of the finished runs of a sweep by everything but the seed; stored as CSV too."""
    jobs = jobs_of(overrides, config_dir)
    table = summary(jobs)
    folder = Path(jobs[0].config.results_dir)
    name = short_hash(str(job.folder.name) for job in jobs)
    path = folder / "sweeps" / f"sweep-{name}.csv"
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())
    shown = table.drop(columns=["marks"]).to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="-")
    return f"{shown}\nsummary: {path}"


def summary(jobs: Sequence[Job]) -> pd.DataFrame:
    """One line per combination of values but the seed's, in the sweep's order."""
    lines: dict[str, list[Job]] = {}
    same = set.intersection(*(set(job.overrides) for job in jobs))
    for job in jobs:
        own = [text for text in job.overrides if text not in same and not text.startswith("seed=")]
        lines.setdefault(" ".join(own) or "all", []).append(job)
    found: list[dict[str, Any]] = []
    for overrides, group in lines.items():
        rows = [job.row for job in group if job.row is not None]
        scores = pd.Series([row.score for row in rows], dtype="float64")
        found.append(
            {
                "overrides": overrides,
                "recipe": rows[0].notation if rows else "",
                "metric": rows[0].metric if rows else "",
                "mean": scores.mean(),
                "sd": scores.std(ddof=1),
                "n": len(rows),
                "missing": len(group) - len(rows),
                "weight_mb": pd.Series([row.weight_bits_actual / 1e6 for row in rows], dtype="float64").mean(),
                "feature_mb": pd.Series([row.feature_bits_actual / 1e6 for row in rows], dtype="float64").mean(),
                "density": pd.Series([row.density_actual for row in rows], dtype="float64").mean(),
                "marks": "; ".join(dict.fromkeys(mark for row in rows for mark in row.marks)),
            }
        )
    return pd.DataFrame(found)


@contextmanager
def notes_lock(folder: Path) -> Iterator[None]:
    """Hold the notes of a sweep as long as it runs, so that no other sweep takes them for left ones."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        yield


def remove_left_notes(folder: Path) -> None:
    """Remove the notes of sweeps whose process is gone."""
    for left in folder.iterdir() if folder.is_dir() else ():
        try:
            with FileLock(left / LOCK, timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except (Timeout, OSError):
            continue


def _files(config_dir: str | None) -> dict[str, str]:
    folders = [files("qprune.configs") / GROUP]
    if config_dir is not None and (Path(config_dir) / GROUP).is_dir():
        folders.append(Path(config_dir) / GROUP)
    found = [entry for folder in folders for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return {entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8") for entry in found}


def state_of(folder: Path) -> tuple[str, Row | None]:
    """How far the run in a folder is (see `Job`), or `broken`, and the row of a finished one."""
    if (folder / ROW_FILE).exists():
        try:
            return "done", load_row(folder / ROW_FILE)
        except UserError:
            return "broken", None
    if (folder / LOCK).exists():
        try:
            with FileLock(folder / LOCK, timeout=0):
                pass
        except Timeout:
            return "running", None
    return ("interrupted" if any((folder / "checkpoints").glob("*.pt")) else "to do"), None


def _kind(config: DictConfig) -> tuple[Any, ...]:
    """What makes two runs equally long, roughly."""
    return (config.task.name, config.epochs, str(config.budget), config.data.source)


def _seconds_left(jobs: Sequence[Job]) -> dict[Path, float | None]:
    """Seconds of training that every unfinished run still takes, by its folder; None where nothing tells."""
    rates = _seconds_per_run(jobs)
    left: dict[Path, float | None] = {}
    for job in jobs:
        if job.state != "done":
            seconds = rates.get(_kind(job.config))
            left[job.folder] = None if seconds is None else seconds * (1 - _progress(job.folder, job.config))
    return left


def _seconds_per_run(jobs: Sequence[Job]) -> dict[tuple[Any, ...], float]:
    """Measured training seconds of a whole run by kind, from all finished runs of the same task and budget."""
    from qprune.runs.store import read_config

    measured: dict[tuple[Any, ...], list[float]] = {}
    kinds = {(_kind(job.config), Path(job.config.results_dir) / job.config.task.name) for job in jobs}
    for kind, folder in kinds:
        for path in sorted(folder.glob("*/timing.json")):
            config = read_config(path.parent)
            try:
                if config is not None and _kind(DictConfig(config)) == kind:
                    measured.setdefault(kind, []).append(float(json.loads(path.read_bytes())["training_seconds"]))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # no measurement; the run itself is judged elsewhere
    return {kind: sum(values) / len(values) for kind, values in measured.items()}


def _progress(folder: Path, config: DictConfig) -> float:
    """Fraction of an interrupted run that its curve shows as trained."""
    curve = read_metrics(folder)
    epochs = min(config.epochs, config.budget.epochs or config.epochs)
    return 0.0 if curve is None or "epoch" not in curve or not len(curve) else min(1.0, curve["epoch"].max() / epochs)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
