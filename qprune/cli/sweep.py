"""`qprune sweep`: one run per combination of values, and a summary over seeds."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from qprune.atomic_write import write_atomically
from qprune.cli import exit_codes as failures
from qprune.config.compose import key_of
from qprune.config.signature import short_hash
from qprune.errors import UserError
from qprune.runs.folder import LOCK_FILE
from qprune.runs.jobs import Job, jobs_of


def sweep(arguments: Sequence[str]) -> int:
    """Carry out one run per combination of the values that are given."""
    from qprune.cli.run import start

    return start("sweep", arguments, multirun=True)


def run_all(overrides: Sequence[str], options: argparse.Namespace, launch: Callable[[Sequence[str]], None]) -> int:
    """Run all jobs of a sweep, however many fail, and return the exit code.

    Jobs may run in other processes or on other machines that share only the results folder, so each leaves a note of
    its outcome there; the notes are removed when all is well. launch: starts the jobs, with further overrides.
    """
    if any(key_of(text) == "hydra.sweep.dir" for text in overrides):
        raise UserError("hydra.sweep.dir is chosen by qprune sweep; set results_dir=... instead, the folder above it")
    jobs = jobs_of(overrides, options.config_dir)
    results_dir = Path(jobs[0].config.results_dir)
    _remove_left_notes(results_dir / "multirun")
    folder = results_dir / "multirun" / uuid.uuid4().hex[:8]
    place = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK_FILE):  # as long as it is held, no other sweep removes these notes
            launch([f"hydra.sweep.dir='{place}'"])
    except Exception as error:
        launcher = [text for text in overrides if text.startswith("hydra/launcher=")]
        if isinstance(error, UserError) or not launcher or _outcomes(folder):
            raise
        raise UserError(
            f"{launcher[-1]} started no run: {error}; without it the runs follow each other here"
        ) from error
    finally:
        outcomes = _outcomes(folder)
        failed = [outcome for outcome in outcomes if outcome["exit_code"]]
        print(_summary_text(jobs_of(overrides, options.config_dir)))
        print(f"{len(outcomes)} runs: {len(outcomes) - len(failed)} finished, {len(failed)} failed")
        for outcome in failed:
            print(f"failed: {' '.join(outcome['overrides'])}: {outcome['message']}", file=sys.stderr)
    if failed:
        return failures.FAILURE
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    """Read how the jobs ended: overrides, exit_code, and a message of failed ones."""
    notes = sorted(folder.glob("job-*.json"), key=lambda path: (len(path.name), path.name))
    return [json.loads(path.read_text(encoding="utf-8")) for path in notes]


def _remove_left_notes(folder: Path) -> None:
    """Remove the notes of sweeps whose process is gone."""
    for left in folder.iterdir() if folder.is_dir() else ():
        try:
            with FileLock(left / LOCK_FILE, timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except (Timeout, OSError):
            continue


def _summary_text(jobs: Sequence[Job]) -> str:
    """Summarize the finished runs of a sweep over seeds; the table is stored too."""
    table = summary(jobs)
    name = short_hash(str(job.folder.name) for job in jobs)
    path = Path(jobs[0].config.results_dir) / "sweeps" / f"sweep-{name}.csv"
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())
    shown = table.drop(columns=["marks"]).to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="-")
    return f"{shown}\nsummary: {path}"


def summary(jobs: Sequence[Job]) -> pd.DataFrame:
    """Return mean, deviation and n per combination of values but the seed's."""
    lines: dict[str, list[Job]] = {}
    same = set.intersection(*(set(job.overrides) for job in jobs))
    for job in jobs:
        own = [text for text in job.overrides if text not in same and not text.startswith("seed=")]
        lines.setdefault(" ".join(own) or "all", []).append(job)
    found: list[dict[str, Any]] = []
    for overrides, group in lines.items():
        rows = [job.row for job in group if job.row is not None]
        names = ["score", "weight_bits_actual", "feature_bits_actual", "density_actual"]
        values = pd.DataFrame([[getattr(row, name) for name in names] for row in rows], columns=names, dtype="float64")
        means = values.mean()
        found.append(
            {
                "overrides": overrides,
                "recipe": rows[0].notation if rows else "",
                "metric": rows[0].metric if rows else "",
                "mean": means["score"],
                "sd": values["score"].std(ddof=1),
                "n": len(rows),
                "missing": len(group) - len(rows),
                "weight_mb": means["weight_bits_actual"] / 1e6,
                "feature_mb": means["feature_bits_actual"] / 1e6,
                "density": means["density_actual"],
                "marks": "; ".join(dict.fromkeys(mark for row in rows for mark in row.marks)),
            }
        )
    return pd.DataFrame(found)
