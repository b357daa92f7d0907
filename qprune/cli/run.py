"""`qprune run`, `sweep` and `plan`: one run, composed once, or many through Hydra."""

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from qprune.atomic_write import write_atomically, write_json
from qprune.cli import exit_codes, failures, signals
from qprune.cli.output import fold
from qprune.cli.sweep_progress import SweepProgress
from qprune.config.compose import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE, Composer, compose_run, key_of, resolved
from qprune.config.schema import RunConfig, json_schema, keys
from qprune.config.signature import as_dict, short_hash
from qprune.config.types import legal, schema_at
from qprune.errors import DEBUG_VARIABLE, RunFailure, UserError, counted
from qprune.runs.folder import LOCK_FILE
from qprune.runs.jobs import Job, expand, first_events, jobs_of, seconds_left, time_left_text
from qprune.runs.lookup import float_row, folder_of
from qprune.runs.row_text import digits, gain_text, score_text
from qprune.training.progress import duration, plain, print_text

_WARM_STARTS = "trainer.warm_start_at"
_DESCRIPTIONS = {
    "run": "Train one recipe, or find it finished, and print its result row. Results go below results_dir.",
    "sweep": "Train the recipes of all combinations of values that are not finished yet, and print a summary.",
}
_EXAMPLES = {
    "run": "task=espcn data=synthetic budget=smoke",
    "sweep": 'task=espcn order=prune_first,quantize_first "seed=range(5)"',
}
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def run(arguments: Sequence[str]) -> int:
    """Carry out one run, or with -m a sweep; print a config with --cfg."""
    return _start("run", arguments)


def sweep(arguments: Sequence[str]) -> int:
    """Carry out one run per combination of the values that are given."""
    return _start("sweep", arguments, multirun=True)


def plan(arguments: Sequence[str]) -> int:
    """Print which tensor gets which operator, and when; or the runs of a sweep."""
    parser = argparse.ArgumentParser(
        "qprune plan",
        description="Print which tensor gets which operator, and when; or, with several values, the runs of the sweep, "
        "which of them are done, and about how long the others take.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for qprune run")
    parser.add_argument("--config-dir", metavar="DIR", help="a further folder of configs")
    options = parser.parse_intermixed_args(arguments)
    overrides = expand(options.overrides, options.config_dir)
    with Composer() as composer:
        is_sweep = any(override.is_sweep_override() for override in composer.parse(overrides))
    if is_sweep:
        print_text(_sweep_text(overrides, options.config_dir))
        return 0
    config = compose_run(overrides, options.config_dir)
    from qprune.runs import execute as runner  # late: it imports torch, and the checks above need not wait for it

    print(runner.plan(config))
    return 0


def _start(verb: str, arguments: Sequence[str], multirun: bool = False) -> int:
    """Do what the arguments of `run` or `sweep` say, and return the exit code."""
    sys.argv = [f"qprune {verb}", *arguments]  # a run notes its command
    options = _parser(verb).parse_intermixed_args(list(arguments))
    options.multirun |= multirun
    asked = [f"--{name}" for name in ("multirun", "cfg", "info") if getattr(options, name)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} cannot be given together; type one of them")
    if options.resolve and not options.cfg:
        raise UserError("--resolve belongs to --cfg; type --cfg job --resolve")
    overrides = expand(options.overrides, options.config_dir)
    for_hydra = [*(word for word in arguments if word not in options.overrides), *overrides]
    if options.cfg and not options.resolve:
        for_hydra.append("--resolve")
    if options.help:
        print(_help(verb, options), end="")
        return 0
    if not arguments:
        raise UserError(failures.NOTHING_TYPED.format(verb=verb, example=_EXAMPLES[verb]))
    if options.info or options.hydra_help or options.shell_completion:
        _hand_over(verb, for_hydra)
        return 0
    with Composer(options.config_dir, options.config_name) as composer:
        parsed = composer.parse(overrides)
        of_hydra = [str(override.input_line) for override in parsed if override.key_or_group.startswith("hydra")]
        full = composer.compose([*of_hydra, *composer.jobs(overrides)[0]])
        is_sweep = options.multirun or full.hydra.mode == RunMode.MULTIRUN
        if not is_sweep:
            composer.refuse_several(overrides)
    config = resolved(full)
    if options.cfg:
        name = options.package
        if name not in (None, "_global_") and OmegaConf.select(full, name) is None:
            raise UserError(f"--package {name} is no section of the config; type for example --package task")
        _hand_over(verb, for_hydra)
        return 0
    if is_sweep:
        return _run_all(overrides, options, lambda extra: _hand_over(verb, ["--multirun", *for_hydra, *extra]))
    checked = RunConfig.check(config)
    from qprune.runs import execute as runner  # late: it imports torch, and the checks above need not wait for it

    signals.stop_if_asked()
    runner.execute(checked)
    return 0


def _hand_over(verb: str, arguments: Sequence[str]) -> None:
    """Let Hydra start the jobs of a sweep, or print what its flags ask for."""
    sys.argv = [f"qprune {verb}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, rather than printing its own report and exiting
    hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, **VERSION_BASE)(_job)()


def hydra_completions(words: Sequence[str]) -> list[str]:
    """List what may stand in place of the last word of a command that composes."""
    os.environ["COMP_LINE"] = " ".join(["qprune", *words])  # where Hydra's plugin for bash looks
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _hand_over("run", ["--shell-completion", "query=bash"])
    return printed.getvalue().split()


def _parser(verb: str) -> argparse.ArgumentParser:
    text = f"{_DESCRIPTIONS[verb]} For example: qprune {verb} {_EXAMPLES[verb]}"
    parser = argparse.ArgumentParser(f"qprune {verb}", description=text, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="choices of groups and values of keys")
    parser.add_argument("--help", "-h", action="store_true", help="print this text")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a further folder of configs")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="the config to begin with, instead of run")
    parser.add_argument("--multirun", "-m", action="store_true", help="one run per combination of values")
    parser.add_argument("--cfg", "-c", choices=("job", "hydra", "all"), help="print the config, and run nothing")
    parser.add_argument("--package", "-p", metavar="SECTION", help="with --cfg: a section of the config")
    parser.add_argument("--resolve", action="store_true", help=argparse.SUPPRESS)  # always
    parser.add_argument("--info", "-i", nargs="?", const="all", choices=_INFO, help="print how Hydra finds its configs")
    parser.add_argument("--hydra-help", "-hh", action="store_true", help="print the help of Hydra")
    parser.add_argument("--shell-completion", "-sc", action="store_true", help=argparse.SUPPRESS)
    return parser


def _help(verb: str, options: argparse.Namespace) -> str:
    """Return usage and flags, groups with their choices, and keys with their meaning."""
    lines = ["groups (GROUP=CHOICE):"]
    with Composer(options.config_dir, options.config_name) as composer:
        lines += [f"  {group}: {', '.join(composer.choices(group))}" for group in composer.groups]
    lines += ["", "keys (KEY=VALUE); the keys of a task are in its YAML, and --cfg job prints all values:"]
    for key, field in keys():
        found = legal(schema_at(json_schema(), key))
        lines.append(f"  {key}: {field.description}{f' ({found})' if found else ''}")
    return "\n".join([_parser(verb).format_help(), *(fold(line, 6) for line in lines), ""])


def _job(cfg: DictConfig) -> None:
    """Carry out one job of a sweep, in this process or another: Hydra calls this."""
    job = HydraConfig.get()
    overrides = [text for text in job.overrides.task if key_of(text) != _WARM_STARTS]
    note: dict[str, Any] = {"overrides": overrides, "exit_code": 0, "message": "", "result": ""}
    place, started = Path(job.sweep.dir) / f"job-{job.job.num}", time.monotonic()
    log = place.with_suffix(".log").open("a", encoding="utf-8")
    try:
        with signals.stopping(), log, contextlib.redirect_stdout(log):
            signals.stop_if_asked()
            print(*overrides, flush=True)  # first, as `_cut_short` expects
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
    if code in (exit_codes.STOPPED, exit_codes.INTERRUPTED):
        sys.exit(code)  # passes through Hydra, which would report an exception in its own way


def _run_all(overrides: Sequence[str], options: argparse.Namespace, launch: Callable[[Sequence[str]], None]) -> int:
    """Run all jobs of a sweep, however many fail, and return the exit code.

    Jobs may run on machines that share only the results folder, so each leaves a note of its outcome there; the notes
    are removed when all is well. launch: starts the jobs, with further overrides.
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
        lock = FileLock(folder / LOCK_FILE)  # as long as it is held, no other sweep removes these notes
        with lock, SweepProgress(folder, [job.overrides for job in jobs]):
            launch([f"hydra.sweep.dir='{place}'", f"++{_WARM_STARTS}={first_events(jobs)}"])
    except Exception as error:
        launcher = [text for text in overrides if text.startswith("hydra/launcher=")]
        cut = _cut_short(folder)
        if isinstance(error, UserError) or not launcher or (_outcomes(folder) and not cut):
            raise
        if cut:
            raise RunFailure(
                f"{launcher[-1]} lost a process, and stopped these runs: {'; '.join(cut)}; the same command goes on "
                f"from their last checkpoints ({error})"
            ) from error
        raise UserError(
            f"{launcher[-1]} started no run: {error}; without it the runs follow each other here"
        ) from error
    finally:
        outcomes = _outcomes(folder)
        stopped = [outcome for outcome in outcomes if outcome["exit_code"] == exit_codes.STOPPED]
        failed = [outcome for outcome in outcomes if outcome["exit_code"] and outcome not in stopped]
        counts = {"finished": len(outcomes) - len(failed) - len(stopped), "failed": len(failed)}
        begun = len(outcomes) + len(cut := _cut_short(folder))
        counts |= {"interrupted": len(stopped) + len(cut), "not started": len(jobs) - begun}
        _print_summary(jobs_of(overrides, options.config_dir))
        shown = [f"{number} {what}" for what, number in counts.items() if number or what in ("finished", "failed")]
        print_text(f"{counted(len(jobs), 'run')}: {', '.join(shown)}")
        for outcome in failed:
            print_text(f"failed: {' '.join(outcome['overrides'])}: {outcome['message']}", stderr=True)
    if failed:
        return exit_codes.FAILURE
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds the notes of another sweep
        folder.parent.rmdir()
    return 0


def _sweep_text(overrides: Sequence[str], config_dir: str | None) -> str:
    """List the runs of a sweep, how far each is, and the time that is left."""
    jobs = jobs_of(overrides, config_dir)
    left = seconds_left(jobs)
    done = sum(job.state == "done" for job in jobs)
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    lines = [f"{counted(len(jobs), 'run')}: {done} done, {len(jobs) - done} left"]
    lines += [f"  each with {' '.join(text for text in jobs[0].overrides if text in common)}"] if common else []
    for job in jobs:
        seconds = left.get(job.folder)
        state = job.state + ("" if seconds is None else f", about {duration(seconds)}")
        lines.append(f"  {' '.join(text for text in job.overrides if text not in common)}  [{state}]")
    return "\n".join([*lines, *([time_left_text(jobs)] if done < len(jobs) else [])])


def _outcomes(folder: Path) -> list[dict[str, Any]]:
    """Read how the jobs ended: overrides, exit_code, and a message of failed ones."""
    notes = sorted(folder.glob("job-*.json"), key=lambda path: (len(path.name), path.name))
    return [json.loads(path.read_text(encoding="utf-8")) for path in notes]


def _cut_short(folder: Path) -> list[str]:
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


def _print_summary(jobs: Sequence[Job]) -> None:
    """Print the finished runs of a sweep, summarized over seeds; the table is stored too."""
    table = _summary(jobs)
    name = short_hash(str(job.folder.name) for job in jobs)
    path = Path(jobs[0].config.results_dir) / "sweeps" / f"sweep-{name}.csv"
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())
    grid = Table(box=None, pad_edge=False)
    for heading in ("overrides", "recipe"):
        grid.add_column(heading, overflow="fold")
    for heading in ("score", "n", *(["missing"] if table["missing"].any() else []), "w+f Mb", "density"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        counts = [str(row["n"]), *([str(row["missing"])] if table["missing"].any() else [])]
        cells = ["-", *counts, "-", "-"]
        if row["n"]:
            cells[0] = score_text(row["metric"], row["mean"], name=False) + (
                f" ± {row['sd']:.2f}" if row["n"] > 1 else ""
            )
            cells[-2:] = [digits(row["weight_mb"] + row["feature_mb"]), digits(row["density"])]
        grid.add_row(plain(row["overrides"]), plain(row["recipe"]), *cells)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(grid)
    print_text(f"summary: {path}")


def _summary(jobs: Sequence[Job]) -> pd.DataFrame:
    """Return mean, deviation and n per combination of values but the seed's."""
    same = set.intersection(*(set(job.overrides) for job in jobs))
    versions = {job.row.arithmetic for job in jobs if job.row}
    lines: list[dict[str, Any]] = []
    for job in jobs:
        own = [text for text in job.overrides if text not in same and not text.startswith("seed=")]
        own += [f"[arithmetic {job.row.arithmetic}]"] if job.row and len(versions) > 1 else []
        lines.append({"overrides": " ".join(own) or "all"} | (vars(job.row) if job.row else {}))
    numbers = ["score", "weight_bits_actual", "feature_bits_actual", "density_actual"]
    runs = pd.DataFrame(lines, columns=["overrides", "notation", "metric", *numbers, "marks"], dtype=object)
    found = (
        runs.astype(dict.fromkeys(numbers, "float64"))
        .groupby("overrides", sort=False, as_index=False)
        .agg(
            recipe=("notation", "first"),
            metric=("metric", "first"),
            mean=("score", "mean"),
            sd=("score", "std"),
            n=("score", "count"),
            missing=("score", lambda scores: scores.isna().sum()),
            weight_mb=("weight_bits_actual", lambda bits: bits.mean() / 1e6),
            feature_mb=("feature_bits_actual", lambda bits: bits.mean() / 1e6),
            density=("density_actual", "mean"),
            marks=("marks", lambda lists: "; ".join(dict.fromkeys(itertools.chain.from_iterable(lists.dropna())))),
        )
    )
    return found.fillna({"recipe": "", "metric": ""})
