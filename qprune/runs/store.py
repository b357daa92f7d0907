"""The stored runs that tables and figures read, checked against their files."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from qprune.config import signature as identity
from qprune.errors import UserError
from qprune.runs.folder import CONFIG_FILE, METRICS_FILE, PUBLISHED, ROW_FILE, RunFolder, read_runs
from qprune.runs.row import Row


@dataclass
class Store:
    """The good rows below `folder` by signature; `problems` says what was left out."""

    folder: Path
    folders: dict[str, RunFolder]
    rows: dict[str, Row]
    problems: list[str]
    checked: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read all rows, also of `published` beside the folder; UserError without both."""
        published = folder.parent / PUBLISHED
        if not folder.is_dir() and not published.is_dir():
            raise UserError(
                f"there is no folder {folder}; name the one that holds the runs with results_dir=..., or make some: "
                "qprune run"
            )
        (own, problems), (others, more) = read_runs(folder), read_runs(published)
        store = cls(folder, {}, {}, problems + more)
        for run, row in (*own, *others):
            if row.signature not in store.rows:
                store.folders[row.signature], store.rows[row.signature] = run, row
        return store

    def check(self, signatures: Iterable[str]) -> None:
        """Compare these rows with their run's files; leave out and name those that differ."""
        for name in [name for name in signatures if name in self.rows and name not in self.checked]:
            self.checked.add(name)
            try:
                _compare(self.folders[name], self.rows[name])
            except UserError as error:
                self.problems.append(str(error))
                del self.rows[name]

    @functools.cached_property
    def seeds(self) -> dict[tuple[str, str], set[int]]:
        """The seeds of the rows, by order and task, of rows left out later too."""
        found: dict[tuple[str, str], set[int]] = {}
        for row in self.rows.values():
            found.setdefault((row.order, row.task), set()).add(row.seed)
        return found


def _compare(run: RunFolder, row: Row) -> None:
    """Raise UserError when a row is not that of its run; missing files pass."""
    advice = "it was edited or copied; run its command again with force=true"
    if run.check(CONFIG_FILE, METRICS_FILE):
        return  # the run wrote the checksums of row, config and curve together
    path = run.path / ROW_FILE
    if (config := run.config()) is not None:
        try:
            stated = {"signature": identity.signature(config)}
            stated |= {"seed": config["seed"], "task": config["task"]["name"], "order": config["order"]["name"]}
            stated |= {"budget": config["budget"]["name"], "data_source": config["data"]["source"]}
        except Exception as error:
            raise UserError(f"{run.path / CONFIG_FILE} is not the config of a run ({error}); {advice}") from error
        for name, value in stated.items():
            if getattr(row, name) != value:
                raise UserError(f"{path}: {name} is {getattr(row, name)!r}, and {CONFIG_FILE} says {value!r}; {advice}")
    curve = run.metrics()
    if curve is not None and len(curve) and row.metric in curve:
        last = float(curve[row.metric].iloc[-1])
        if not math.isclose(last, row.score, rel_tol=1e-6, abs_tol=1e-9):
            raise UserError(f"{path}: the score is {row.score:g}, and {METRICS_FILE} ends with {last:g}; {advice}")
