"""The stored runs that tables, comparisons and figures read: rows checked against the files beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from qprune.config import signature as identity
from qprune.errors import UserError
from qprune.runs import row as results
from qprune.runs.checksums import check_sums
from qprune.runs.row import Row

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.csv"
PUBLISHED = "published"  # folder beside that of the runs: rows that are committed with a project


@dataclass
class Store:
    """The good rows below `folder`, by signature, with their files; problems: what was left out, and why."""

    folder: Path
    paths: dict[str, Path]
    rows: dict[str, Row]
    problems: list[str]
    sums: dict[str, Mapping[str, str] | None]  # checksums of the files beside each row
    checked: set[str] = field(default_factory=set)
    _columns: pd.DataFrame | None = None
    _seeds: dict[tuple[str, str], set[int]] | None = None

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
        theirs, more = results.read_stored(published)
        entries = {entry.row.signature: entry for entry in stored}
        entries |= {entry.row.signature: entry for entry in theirs if entry.row.signature not in entries}
        paths = {name: entry.path for name, entry in entries.items()}
        rows = {name: entry.row for name, entry in entries.items()}
        return cls(folder, paths, rows, problems + more, {name: entry.sums for name, entry in entries.items()})

    def check(self, signatures: Iterable[str]) -> None:
        """Compare these rows with their run's other files; one that does not fit them is left out and named."""
        for name in [name for name in signatures if name in self.rows and name not in self.checked]:
            self.checked.add(name)
            try:
                _compare(self.paths[name], self.rows[name], self.sums[name])
            except UserError as error:
                self.problems.append(str(error))
                del self.rows[name]
                self._columns = self._seeds = None

    @property
    def columns(self) -> pd.DataFrame:
        """The rows as a table, a column per field, by signature; their types were checked when they were read."""
        if self._columns is None:
            rows = self.rows.values()
            names = [field.name for field in fields(Row)]
            columns = {name: list(map(attrgetter(name), rows)) for name in names}
            self._columns = pd.DataFrame(columns, index=pd.Index(list(self.rows), dtype="object"))
        return self._columns

    def seeds(self, order: str, task: str) -> set[int]:
        """The seeds that there are rows of in an order of a task."""
        if self._seeds is None:
            self._seeds = {}
            for row in self.rows.values():
                self._seeds.setdefault((row.order, row.task), set()).add(row.seed)
        return self._seeds.get((order, task), set())

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


def _compare(path: Path, row: Row, sums: Mapping[str, str] | None) -> None:
    """Raise UserError when a row is not that of its run. What is not there cannot contradict it."""
    advice = "it was edited or copied; run its command again with force=true"
    if check_sums(path.parent, (CONFIG_FILE, METRICS_FILE), sums):
        return  # row, config and curve were looked at together when the run wrote their checksums
    if (config := read_config(path.parent)) is not None:
        try:
            expected = identity.signature(config)
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
