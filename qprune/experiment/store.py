"""The stored runs that tables, comparisons and figures read: rows checked against the files beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from omegaconf import OmegaConf

from qprune.errors import UserError
from qprune.experiment import identity, results
from qprune.experiment.digests import check_sums
from qprune.experiment.results import Row

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.csv"
PUBLISHED = "published"  # folder beside that of the runs: rows that are committed with a project


@dataclass
class Store:
    """The good rows below `folder`, by signature, with their files; problems: what was left out, and why."""

    folder: Path
    paths: dict[str, Path]
    rows: dict[str, Row]
    problems: list[str]
    checked: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path) -> Store:
        """Read all rows, and those that only the folder `published` beside it has. UserError if there is neither."""
        published = folder.parent / PUBLISHED
        if not folder.is_dir() and not published.is_dir():
            raise UserError(
                f"there is no folder {folder}; name the one that holds the runs with results_dir=..., or make some: "
                "qprune run"
            )
        stored, problems = results.read_stored(folder)
        there = {row.signature for row in stored.values()}
        theirs, more = results.read_stored(published)
        stored |= {path: row for path, row in theirs.items() if row.signature not in there}
        paths = {row.signature: path for path, row in stored.items()}
        return cls(folder, paths, {row.signature: row for row in stored.values()}, problems + more)

    def check(self, signatures: Iterable[str]) -> None:
        """Compare these rows with their run's other files; one that does not fit them is left out and named."""
        for name in [name for name in signatures if name in self.rows and name not in self.checked]:
            self.checked.add(name)
            try:
                _compare(self.paths[name], self.rows[name])
            except UserError as error:
                self.problems.append(str(error))
                del self.rows[name]

    def config(self, signature: str) -> dict[str, Any] | None:
        """The resolved config of a run, or None where the file is missing or unreadable."""
        return read_config(self.paths[signature].parent)

    def config_text(self, signature: str) -> str | None:
        """The config of a run as it stands in its file, or None where that is missing or unreadable."""
        return _config_text(self.paths[signature].parent)

    def metrics(self, signature: str) -> pd.DataFrame | None:
        """The curve of a run, one line per epoch, or None where it is missing or unreadable."""
        return read_metrics(self.paths[signature].parent)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The resolved config in a run folder, or None."""
    if (text := _config_text(folder)) is None:
        return None
    try:
        config = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (ValueError, yaml.YAMLError):
        return None
    return config if isinstance(config, dict) else None


def _config_text(folder: Path) -> str | None:
    try:
        return (folder / CONFIG_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def read_metrics(folder: Path) -> pd.DataFrame | None:
    """The curve in a run folder, or None."""
    try:
        return pd.read_csv(folder / METRICS_FILE)
    except (OSError, ValueError):  # pandas' own errors for empty and broken files are ValueErrors
        return None


def _compare(path: Path, row: Row) -> None:
    """Raise UserError when a row is not that of its run. What is not there cannot contradict it."""
    advice = "it was edited or copied; run its command again with force=true"
    if check_sums(path.parent, (CONFIG_FILE, METRICS_FILE)):
        return  # row, config and curve were looked at together when the run wrote their checksums
    if (config := read_config(path.parent)) is not None:
        try:
            expected = identity.signature(OmegaConf.create(config))
            told = {"seed": config["seed"], "task": config["task"]["name"], "order": config["order"]["name"]}
            told |= {"budget": config["budget"]["name"], "data_source": config["data"]["source"]}
        except Exception as error:
            raise UserError(f"{path.parent / CONFIG_FILE} is not the config of a run ({error}); {advice}") from error
        if expected != row.signature:
            raise UserError(f"{path}: the signature is not that of {CONFIG_FILE} beside it; {advice}")
        for name, value in told.items():
            if getattr(row, name) != value:
                raise UserError(f"{path}: {name} is {getattr(row, name)!r}, and {CONFIG_FILE} says {value!r}; {advice}")
    curve = read_metrics(path.parent)
    if curve is not None and len(curve) and row.metric in curve:
        last = float(curve[row.metric].iloc[-1])
        if not math.isclose(last, row.score, rel_tol=1e-6, abs_tol=1e-9):
            raise UserError(f"{path}: the score is {row.score:g}, and {METRICS_FILE} ends with {last:g}; {advice}")
