"""Write a results card per task and the ML code completeness list: python scripts/write_cards.py [RESULTS]

Everything in them is read from the rows, environments and timings below RESULTS/published (default: results).
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qprune.atomic_write import write_atomically, write_json
from qprune.errors import UserError, counted
from qprune.reporting.recipes import recipes
from qprune.runs.folder import ENVIRONMENT_FILE, PUBLISHED, TIMING_FILE
from qprune.runs.row import Row
from qprune.runs.row_text import score_text
from qprune.runs.store import Store

_GROUP = ("budget", "data_source", "arithmetic", "recipe", "metric")


def main(arguments: list[str]) -> int:
    """Write the files. Exit code 1 when rows were left out, 2 when there is nothing to read."""
    results = Path(arguments[0] if arguments else "results")
    try:
        store = Store.read(results / PUBLISHED)
        store.check(list(store.rows))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tasks = {}
    for task in sorted({row.task for row in store.rows.values()}):
        table = runs_of(store, task)
        write_atomically(results / "cards" / f"{task}.md", card(task, table).encode())
        tasks[task] = facts(task, table)
    write_json(results / "completeness.json", completeness(tasks))
    print(f"{counted(len(tasks), 'card')} in {results / 'cards'}\nlist: {results / 'completeness.json'}")
    for problem in store.problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if store.problems else 0


def runs_of(store: Store, task: str) -> pd.DataFrame:
    """Return a line per run of a task: its row, recipe, command, commit, versions, data and seconds of training."""
    rows = [row for row in store.rows.values() if row.task == task]
    names = recipes(store, rows)
    return pd.DataFrame([_line(store, row, names[row.signature]) for row in rows])


def _line(store: Store, row: Row, recipe: str) -> dict[str, Any]:
    folder = store.folders[row.signature].path
    environment = _json(folder / ENVIRONMENT_FILE)
    verb, *words = environment.get("command") or ["unknown"]
    git = environment.get("git") or {}
    fields = ("budget", "data_source", "arithmetic", "metric", "score", "seed", "density_actual", "marks")
    return {name: getattr(row, name) for name in fields} | {
        "recipe": recipe,
        "mb": row.size_bits() / 1e6,
        "command": f"{verb} {shlex.join(sorted(word for word in words if not word.startswith('seed=')))}".strip(),
        "commit": git.get("commit", "unknown"),
        "changed": bool(git.get("changed", True)),
        "torch": environment.get("packages", {}).get("torch", "unknown"),
        "data": environment.get("dataset", {}),
        "hours": _json(folder / TIMING_FILE).get("training_seconds", 0.0) / 3600,
    }


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
    return found


def card(task: str, runs: pd.DataFrame) -> str:
    """Write the card of a task in Markdown; rows of different versions of the arithmetic are never averaged."""
    text = [
        f"# Results card: {task}",
        "",
        "Written by `python scripts/write_cards.py` from the rows in `published/`.",
        "",
    ]
    text += ["| recipe | budget, data | arithmetic | score | n | size Mb | density | marks |"]
    text += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
    notes = list(dict.fromkeys(mark for marks in runs["marks"] for mark in marks))
    for (budget, data, arithmetic, recipe, metric), group in runs.groupby(list(_GROUP), sort=True):
        score = score_text(metric, group["score"].mean())
        score += f" ± {group['score'].std():.2g}" if len(group) > 1 else ""
        own = sorted({notes.index(mark) + 1 for marks in group["marks"] for mark in marks})
        cells = (f"`{recipe}`", f"{budget}, {data}", arithmetic, score, len(group))
        cells += (f"{group['mb'].mean():.4g}", f"{group['density_actual'].mean():.4g}", " ".join(map(str, own)))
        text.append(f"| {' | '.join(map(str, cells))} |")
    text += [
        "",
        "Scores are means and standard deviations over n seeds; size and density are in the accounting `actual`.",
    ]
    text += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1))]
    known = facts(task, runs)
    text += ["", "## How it was trained", ""]
    text += [f"- `{command}`" for command in known["trained"]]
    text += ["", "## How it is evaluated", "", f"- `{known['evaluated']}`", "", "## With what", ""]
    text += [f"- commit {commit}: {counted(n, 'row')}" for commit, n in known["commits"].items()]
    text += [f"- rows from a tree with changes: {known['rows_from_changed_trees']}"]
    text += [f"- torch {version}: {counted(n, 'row')}" for version, n in known["torch"].items()]
    text += [f"- data, {name}: sha256 {sums}" for name, sums in known["data"].items()]
    text += [f"- {known['training_hours']:.1f} hours of training, {counted(known['rows'], 'row')}", ""]
    return "\n".join(text)


def facts(task: str, runs: pd.DataFrame) -> dict[str, Any]:
    """Return how a task's rows were trained and evaluated, by which commits, on which data."""
    data: dict[str, list[str]] = {}
    for sums in runs["data"]:
        for name, digest in sums.items():
            data[name] = sorted({*data.get(name, []), digest})
    return {
        "rows": len(runs),
        "seeds": sorted(set(runs["seed"].tolist())),
        "trained": sorted(set(runs["command"])),
        "evaluated": f"qprune evaluate RUN, and the tables: qprune tables task={task}",
        "commits": _counts(runs["commit"]),
        "rows_from_changed_trees": int(runs["changed"].sum()),
        "arithmetic": sorted(set(runs["arithmetic"].tolist())),
        "torch": _counts(runs["torch"]),
        "data": {name: ", ".join(sums) for name, sums in sorted(data.items())},
        "training_hours": round(float(runs["hours"].sum()), 2),
    }


def _counts(values: Sequence[str]) -> dict[str, int]:
    return {str(value): int(n) for value, n in pd.Series(values).value_counts().sort_index().items()}


def completeness(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the five items of the ML Code Completeness Checklist, and what is known of each task."""
    return {
        "checklist": "ML Code Completeness Checklist (NeurIPS 2020)",
        "dependencies": {"complete": True, "where": ["pyproject.toml", "constraints.txt"]},
        "training_code": {"complete": True, "command": "qprune run, or qprune tables --run-missing"},
        "evaluation_code": {"complete": True, "command": "qprune evaluate RUN"},
        "pretrained_models": {"complete": False, "why": "networks are not published; their commands train them again"},
        "results": {"complete": True, "where": ["results/README.md", "results/cards", "results/tables"]},
        "tasks": tasks,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
