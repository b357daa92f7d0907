"""The stored runs that tables and figures read, checked against their files."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self, TypeVar

from qprune.compression.schedule import Timeline
from qprune.config import signature as identity
from qprune.config.schema import RunConfig
from qprune.errors import UserError, counted
from qprune.runs.environment import marks_of_trees
from qprune.runs.folder import CONFIG_FILE, METRICS_FILE, PUBLISHED, ROW_FILE, RunFolder, read_runs
from qprune.runs.row import Row

T = TypeVar("T")


@dataclass
class Store:
    """The good rows below `folder` by signature; `problems` says what was left out."""

    folder: Path
    folders: dict[str, RunFolder]
    rows: dict[str, Row]
    problems: list[str]
    checked: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path, arithmetic: int | None = None) -> Self:
        """Read all rows, also of `published` beside the folder; UserError without both.

        Of rows with one signature, that of the newest arithmetic counts. Rows whose environment gives reason for it get
        a mark. arithmetic: the one version to read; None: all.
        """
        published = folder.parent / PUBLISHED
        if not folder.is_dir() and not published.is_dir():
            raise UserError(
                f"there is no folder {folder}; name the one that holds the runs with results_dir=..., or make some: "
                "qprune run"
            )
        (own, problems), (others, more) = read_runs(folder), read_runs(published)
        store = cls(folder, {}, {}, problems + more)
        runs, environments = [], []
        for run, row in (*own, *others):
            if arithmetic in (None, row.arithmetic):
                try:
                    environments.append(run.environment().model_dump())
                    runs.append((run, row))
                except UserError as error:
                    store.problems.append(str(error))
        for (run, row), found in zip(runs, marks_of_trees(environments), strict=True):
            known = store.rows.get(row.signature)
            if known is None or known.arithmetic < row.arithmetic:
                store.folders[row.signature] = run
                store.rows[row.signature] = replace(row, marks=[*row.marks, *found]) if found else row
        return store

    def check(self, signatures: Iterable[str]) -> None:
        """Compare these rows with their run's files; leave out and name those that differ."""
        new = [name for name in signatures if name in self.rows and name not in self.checked]
        self.checked.update(new)
        self.leave_out_bad(_require_own_row, new)

    def stored(self, signature: str, read: Callable[[RunFolder], T]) -> T | None:
        """Return what `read` finds in a run's folder; None, and a problem, where a file is not as it should be."""
        try:
            return read(self.folders[signature])
        except UserError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def leave_out_bad(self, read: Callable[[RunFolder], object], signatures: Iterable[str] | None = None) -> None:
        """Leave out the rows (all, or `signatures`) for which `read` raises UserError, and record why."""
        for name in list(self.rows if signatures is None else signatures):
            try:
                read(self.folders[name])
            except UserError as error:
                self.problems.append(str(error))
                del self.rows[name]

    def recovery(self, signature: str) -> dict[str, float]:
        """Return the training left after the last events, for old rows from config and curve; empty where unknown."""
        row = self.rows[signature]
        if row.recovery:
            return row.recovery
        curve, timeline = self.stored(signature, RunFolder.metrics), self.timeline(signature)
        if curve is None or timeline is None or "learning_rate" not in curve or len(curve) != row.epochs:
            return {}
        return timeline.recovery(curve["learning_rate"].tolist())

    def timeline(self, signature: str) -> Timeline | None:
        """Return the schedule of a run in its own steps, if its config is there and fits the row."""
        row, config = self.rows[signature], self.stored(signature, RunFolder.config)
        if config is None or row.steps % row.epochs:
            return None
        try:
            return RunConfig.check(config).events().in_steps(row.steps // row.epochs)
        except UserError:
            return None

    def newest(self, signatures: Iterable[str]) -> set[str]:
        """Return the rows of the newest arithmetic among these."""
        versions = {name: self.rows[name].arithmetic for name in signatures}
        last = max(versions.values(), default=0)
        return {name for name, version in versions.items() if version == last}

    @functools.cached_property
    def seeds(self) -> dict[tuple[str, str], set[int]]:
        """The seeds of the rows, by order and task, of rows left out later too."""
        found: dict[tuple[str, str], set[int]] = {}
        for row in self.rows.values():
            found.setdefault((row.order, row.task), set()).add(row.seed)
        return found


def versions_text(left_out: Iterable[int]) -> list[str]:
    """Say how many runs are left out, by version of their arithmetic."""
    return [
        f"{counted(number, 'run')} of arithmetic version {version} left out"
        for version, number in sorted(Counter(left_out).items())
    ]


def _require_own_row(run: RunFolder) -> None:
    """Raise UserError when a row is not that of its run; missing files pass."""
    advice = "it was edited or copied; run its command again with force=true"
    if run.check(CONFIG_FILE, METRICS_FILE):
        return  # the run wrote the checksums of row, config and curve together
    path, row = run.path / ROW_FILE, run.row()
    if (config := run.config()) is not None:
        stated = {"signature": identity.signature(config)}
        stated |= {"seed": config["seed"], "task": config["task"]["name"], "order": config["order"]["name"]}
        stated |= {"budget": config["budget"]["name"], "data_source": config["data"]["source"]}
        for name, value in stated.items():
            if getattr(row, name) != value:
                raise UserError(f"{path}: {name} is {getattr(row, name)!r}, and {CONFIG_FILE} says {value!r}; {advice}")
    curve = run.metrics()
    if curve is not None and len(curve) and row.metric in curve:
        last = float(curve[row.metric].iloc[-1])
        if not math.isclose(last, row.score, rel_tol=1e-6, abs_tol=1e-9):
            raise UserError(f"{path}: the score is {row.score:g}, and {METRICS_FILE} ends with {last:g}; {advice}")
