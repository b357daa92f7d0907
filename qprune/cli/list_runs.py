"""`qprune list runs`: every run below results_dir and published beside it, with its state and score."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qprune.cli.failures import FAILURE
from qprune.config.compose import Composer, values_of
from qprune.config.schema import keys
from qprune.errors import UserError, closest, counted, one_of
from qprune.runs.folder import CONFIG_FILE, LOCK_FILE, PUBLISHED, ROW_FILE, RunFolder
from qprune.runs.row import Row
from qprune.runs.row_text import digits, score_text
from qprune.training.progress import plain, print_text

STATES = ("running", "interrupted", "failed", "finished", "published")
# Keys that stand for a group, with the field of the config that holds the choice
_CHOICES = {"task": "task.name", "order": "order.name", "budget": "budget.name", "data": "data.source"}
_WIDE = 120  # columns from which on sizes are shown too
_NUMBERS = ("score", "size Mb", "density")


@dataclass(frozen=True)
class Listed:
    """A run: folder, its name in the list, state, row if it is finished, and what is wrong with its files."""

    folder: RunFolder
    name: str
    state: str
    row: Row | None
    problem: str = ""


def print_runs(folder: Path, filters: Sequence[str]) -> int:
    """Print the runs that the filters (KEY=VALUE) leave. Exit code 1 when rows were left out."""
    if not folder.is_dir() and not (folder.parent / PUBLISHED).is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds the runs with results_dir=...")
    wanted = _wanted(filters)
    runs = [run for each in listed(folder) if (run := _matching(each, wanted))]
    good = [run for run in runs if not run.problem]
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)  # a pipe has no width to fit into
    if good:
        console.print(_table(good, wide=console.width >= _WIDE))
        states = Counter(run.state for run in good)
        counts = ", ".join(f"{states[state]} {state}" for state in STATES if states[state])
        print_text(f"{counted(len(good), 'run')}: {counts}")
        places = [folder] if states.total() > states["published"] else []
        places += [folder.parent / PUBLISHED] if states["published"] else []
        print_text(f"below {' and '.join(map(str, places))}; a name ends with the first digits of the run's signature")
    else:
        print_text(" ".join([f"no runs below {folder}", *(["with", *filters] if filters else [])]))
    for run in runs:
        if run.problem:
            print_text(f"left out: {run.problem}", stderr=True)
    return FAILURE if any(run.problem for run in runs) else 0


def listed(results_dir: Path) -> Iterator[Listed]:
    """Iterate over the runs in the order of their names; a run that is finished here is not listed as published."""
    seen: set[str] = set()
    for place, published in ((results_dir, False), (results_dir.parent / PUBLISHED, True)):
        known = (CONFIG_FILE, ROW_FILE, LOCK_FILE)
        for path in sorted({path.parent for name in known for path in place.glob(f"*/*/{name}")}):
            run, name = RunFolder(path), str(path.relative_to(place))
            state, row = run.state()
            if state == "to do" or (published and name in seen):
                continue
            if state == "broken":
                try:
                    run.row()
                except UserError as error:
                    yield Listed(run, name, state, None, str(error))
                continue
            if state == "done":
                seen.add(name)
            yield Listed(run, name, {"done": "published" if published else "finished"}.get(state, state), row)


def _table(runs: Sequence[Listed], wide: bool) -> Table:
    headings = ("run", "state", "score", "size Mb", "density", "budget, data")[: 6 if wide else 3]
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", overflow="fold")
    for run in runs:
        cells = [run.name, run.state]
        if (row := run.row) is not None:
            cells += [score_text(row.metric, row.score, name=False), digits(row.size_bits() / 1e6)]
            cells += [digits(row.density_actual), f"{row.budget}, {row.data_source}"]
        table.add_row(*map(plain, cells[: len(headings)]))
    return table


def _wanted(filters: Sequence[str]) -> dict[str, set[str]]:
    """Return the allowed values of each key; several as for a sweep: seed=0,1 or seed=range(3)."""
    wanted, known = {}, [*_CHOICES, "state", *(key for key, _ in keys())]
    with Composer() as composer:
        for override in composer.parse(filters):
            key = str(override.key_or_group)
            if not key.startswith("task.") and key not in known:
                raise UserError(f"no run has a key {key!r} (all keys: qprune run --help){closest(key, known)}")
            wanted[key] = {value.partition("=")[2].strip("'\"") for value in values_of(override)}
    for state in wanted.get("state", ()):
        one_of("state", state, STATES)
    return wanted


def _matching(run: Listed, wanted: Mapping[str, set[str]]) -> Listed | None:
    """Return a run if it matches, or with the problem if that cannot be known."""
    others = {key: values for key, values in wanted.items() if key != "state"}
    if run.state not in wanted.get("state", {run.state}):
        return None
    try:
        config = run.folder.config() if others else {}
    except UserError as error:
        return replace(run, problem=str(error))
    return run if all(_value(config, _CHOICES.get(key, key)) in values for key, values in others.items()) else None


def _value(config: Mapping[str, Any] | None, key: str) -> str:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return str(value).lower() if isinstance(value, bool | None) else str(value)
