"""Carry out the runs of a sweep, each as a job that Hydra starts, and summarize them."""

import contextlib
import json
import os
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from qprune.atomic_write import csv_bytes, write_atomically, write_json
from qprune.cli import failures, signals
from qprune.cli.sweep_progress import SweepProgress
from qprune.config.compose import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE, key_of, text_override
from qprune.config.schema import RunConfig
from qprune.config.signature import as_dict, short_hash
from qprune.errors import DEBUG_VARIABLE, RunFailure, UserError, counted
from qprune.runs.folder import LOCK_FILE
from qprune.runs.jobs import Job, first_events, jobs_of
from qprune.runs.lookup import float_row, folder_of
from qprune.runs.row import Row
from qprune.runs.row_text import digits, gain_text, score_text
from qprune.training.progress import plain, print_text

_WARM_STARTS = "trainer.warm_start_at"


def run_all(overrides: Sequence[str], config_dir: str | None) -> int:
    """Carry out all runs of a sweep, however many fail, and return the exit code.

    They may run on machines that share only the results folder, so each leaves a note of its outcome there; the notes
    are removed when all is well.
    """
    if any(key_of(text) == "hydra.sweep.dir" for text in overrides):
        raise UserError("hydra.sweep.dir is chosen by qprune sweep; set results_dir=... instead, the folder above it")
    jobs = jobs_of(overrides, config_dir)
    notes = Path(jobs[0].config.results_dir) / "multirun"
    _remove_left_notes(notes)
    folder = notes / uuid.uuid4().hex[:8]
    own = [text_override("hydra.sweep.dir", str(folder)), f"++{_WARM_STARTS}={first_events(jobs)}"]
    flags = ["--config-dir", config_dir] if config_dir else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE)  # as long as it is held, no other sweep removes these notes
        with lock, SweepProgress(folder, [job.overrides for job in jobs]):
            start_hydra(["--multirun", *flags, *overrides, *own])
    except Exception as error:
        launcher = [text for text in overrides if text.startswith("hydra/launcher=")]
        killed = _killed(folder)
        if isinstance(error, UserError) or not launcher or (_outcomes(folder) and not killed):
            raise
        if killed:
            raise RunFailure(
                f"{launcher[-1]} lost a process, and stopped these runs: {'; '.join(killed)}; the same command goes "
                f"on from their last checkpoints ({error})"
            ) from error
        advice = "without it the runs follow each other here"
        raise UserError(f"{launcher[-1]} started no run: {error}; {advice}") from error
    finally:
        _print_summary(jobs_of(overrides, config_dir))
        failed = _print_counts(len(jobs), folder)
    if failed:
        return failures.FAILURE
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        notes.rmdir()  # unless another sweep has notes there
    return 0


def start_hydra(arguments: Sequence[str]) -> None:
    """Call Hydra as its own command line would be called: it starts the jobs of a sweep."""
    sys.argv = ["qprune sweep", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, rather than printing its own report and exiting
    hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, **VERSION_BASE)(_job)()


def _job(cfg: DictConfig) -> None:
    """Carry out one job of a sweep, in this process or another: Hydra calls this."""
    job = HydraConfig.get()
    overrides = [text for text in job.overrides.task if key_of(text) != _WARM_STARTS]
    further = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    flags = ["--config-dir", *further] if further else []
    sys.argv = ["qprune run", *flags, *overrides]  # a run notes the command that trains it
    note: dict[str, Any] = {"overrides": overrides, "exit_code": 0, "message": "", "result": ""}
    place, started = Path(job.sweep.dir) / f"job-{job.job.num}", time.monotonic()
    log = place.with_suffix(".log").open("a", encoding="utf-8")
    try:
        with signals.stopping(), log, contextlib.redirect_stdout(log):
            signals.stop_if_asked()
            print(*overrides, flush=True)  # first, as `_killed` expects
            from qprune.runs import execute as runner

            config = RunConfig.check(as_dict(cfg))
            note["before"] = folder_of(config).finished
            if (row := runner.execute(config, wait=True)) is not None:  # another sweep may have this run
                note["result"] = gain_text(row, float_row(config))
    except (Exception, KeyboardInterrupt) as error:
        note["exit_code"], note["message"] = failures.explain(error)
        if os.environ.get(DEBUG_VARIABLE) == "1":
            traceback.print_exception(error)
    code = note["exit_code"]
    write_json(place.with_suffix(".json"), note | {"seconds": time.monotonic() - started})
    # jobs behind a failed one still run; not so behind one that was told to stop
    if code in (failures.STOPPED, failures.INTERRUPTED):
        sys.exit(code)  # passes through Hydra, which would report an exception in its own way


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    """Read how the jobs ended: overrides, exit_code, and a message of failed ones."""
    notes = sorted(folder.glob("job-*.json"), key=lambda path: (len(path.name), path.name))
    return [json.loads(path.read_text(encoding="utf-8")) for path in notes]


def _killed(folder: Path) -> list[str]:
    """List the overrides of jobs that have begun and left no note: their process was killed."""
    logs = [path for path in sorted(folder.glob("job-*.log")) if not path.with_suffix(".json").exists()]
    return [path.read_text(encoding="utf-8").partition("\n")[0] for path in logs]


def _remove_left_notes(folder: Path) -> None:
    """Remove the notes of sweeps whose process is gone."""
    for left in folder.iterdir() if folder.is_dir() else ():
        try:
            with FileLock(left / LOCK_FILE, timeout=0):
                shutil.rmtree(left, ignore_errors=True)
        except (Timeout, OSError):
            continue


def _print_counts(total: int, folder: Path) -> bool:
    """Print how many of the runs ended how, and why those that failed did; return whether any failed."""
    outcomes = _outcomes(folder)
    stopped = [outcome for outcome in outcomes if outcome["exit_code"] == failures.STOPPED]
    failed = [outcome for outcome in outcomes if outcome["exit_code"] and outcome not in stopped]
    killed = _killed(folder)
    counts = {
        "finished": len(outcomes) - len(failed) - len(stopped),
        "failed": len(failed),
        "interrupted": len(stopped) + len(killed),
        "not started": total - len(outcomes) - len(killed),
    }
    shown = [f"{number} {what}" for what, number in counts.items() if number or what in ("finished", "failed")]
    print_text(f"{counted(total, 'run')}: {', '.join(shown)}")
    for outcome in failed:
        print_text(f"failed: {' '.join(outcome['overrides'])}: {outcome['message']}", stderr=True)
    return bool(failed)


def _print_summary(jobs: Sequence[Job]) -> None:
    """Print the finished runs of a sweep, summarized over seeds; the table is stored too."""
    table = _summary(jobs)
    name = short_hash(str(job.folder.name) for job in jobs)
    path = Path(jobs[0].config.results_dir) / "sweeps" / f"sweep-{name}.csv"
    write_atomically(path, csv_bytes(table))
    grid = Table(box=None, pad_edge=False)
    for heading in ("overrides", "recipe"):
        grid.add_column(heading, overflow="fold")
    counts = ["n", "missing"] if table["missing"].any() else ["n"]
    for heading in ("score", *counts, "w+f Mb", "density"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        score, size, density = "-", "-", "-"
        if row["n"]:
            spread = f" ± {row['sd']:.2f}" if row["n"] > 1 else ""
            score = score_text(row["metric"], row["mean"], name=False) + spread
            size, density = digits(row["weight_mb"] + row["feature_mb"]), digits(row["density"])
        cells = [row["overrides"], row["recipe"], score, *(row[name] for name in counts), size, density]
        grid.add_row(*map(plain, cells))
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(grid)
    print_text(f"summary: {path}")


def _summary(jobs: Sequence[Job]) -> pd.DataFrame:
    """Return mean, deviation and n per combination of values but the seed's."""
    same = set.intersection(*(set(job.overrides) for job in jobs))
    versions = {job.row.arithmetic for job in jobs if job.row}
    groups: dict[str, list[Row | None]] = {}
    for job in jobs:
        own = [text for text in job.overrides if text not in same and not text.startswith("seed=")]
        own += [f"[arithmetic {job.row.arithmetic}]"] if job.row and len(versions) > 1 else []
        groups.setdefault(" ".join(own) or "all", []).append(job.row)
    lines = []
    for overrides, group in groups.items():
        rows = [row for row in group if row]
        numbers = ["score", "weight_bits_actual", "feature_bits_actual", "density_actual"]
        runs = pd.DataFrame([vars(row) for row in rows], columns=numbers, dtype=float)
        lines.append(
            {
                "overrides": overrides,
                "recipe": rows[0].notation if rows else "",
                "metric": rows[0].metric if rows else "",
                "mean": runs["score"].mean(),
                "sd": runs["score"].std(),
                "n": len(rows),
                "missing": len(group) - len(rows),
                "weight_mb": runs["weight_bits_actual"].mean() / 1e6,
                "feature_mb": runs["feature_bits_actual"].mean() / 1e6,
                "density": runs["density_actual"].mean(),
                "marks": "; ".join(dict.fromkeys(mark for row in rows for mark in row.marks)),
            }
        )
    return pd.DataFrame(lines)
