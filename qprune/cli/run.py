"""The verbs that train or plan: `run` and `sweep` hand over to Hydra, `plan` composes and prints."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qprune.atomic_write import write_json
from qprune.cli import exit_codes as failures
from qprune.cli.sweep import (
    expand,
    is_named_sweep,
    is_sweep,
    notes_lock,
    plan_text,
    remove_left_notes,
    summary_text,
)
from qprune.config.compose import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE, Composed, compose_checked
from qprune.errors import UserError


def run(arguments: Sequence[str]) -> int:
    """`qprune run`: one run, or with -m a sweep; Hydra's own flags (--cfg, --info, --help ...) work."""
    return _start("run", arguments)


def sweep(arguments: Sequence[str]) -> int:
    """`qprune sweep`: one run per combination of the values that are given."""
    return _start("sweep", ["--multirun", *arguments])


def plan(arguments: Sequence[str]) -> int:
    """`qprune plan`: what a run would do to which tensor, without running it."""
    parser = argparse.ArgumentParser(
        "qprune plan",
        description="Print which tensor gets which operator, and when; or, with several values, the runs of the sweep, "
        "which of them are done, and about how long the others take.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for qprune run")
    parser.add_argument("--config-dir", help="a further folder of configs")
    options = parser.parse_intermixed_args(arguments)
    overrides = expand(options.overrides, options.config_dir)
    if is_sweep(overrides):
        print(plan_text(overrides, options.config_dir))
        return 0
    composed = compose_checked(overrides, config_dir=options.config_dir)
    from qprune.runs import execute as runner  # late: it imports torch, and the checks above need not wait for it

    print(runner.plan(composed[0].config))
    return 0


def hand_over(arguments: Sequence[str], verb: str = "run") -> None:
    """Let Hydra read `arguments` and start the jobs, or print what its flags ask for."""
    sys.argv = [f"qprune {verb}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, rather than printing its own report and exiting
    hydra.main(config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME, **VERSION_BASE)(_job)()


def hydra_completions(words: Sequence[str]) -> list[str]:
    """What may stand in place of the last of `words`, the arguments of a verb that composes a config."""
    os.environ["COMP_LINE"] = " ".join(["qprune", *words])  # where Hydra's plugin for bash looks
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        hand_over(["--shell-completion", "query=bash"])
    return printed.getvalue().split()


def _start(verb: str, arguments: Sequence[str]) -> int:
    sys.argv = [f"qprune {verb}", *arguments]
    arguments = _options_first(arguments)
    options = get_args_parser().parse_args(arguments)
    if any(is_named_sweep(text) for text in options.overrides):
        arguments = expand(arguments, options.config_dir)
        options = get_args_parser().parse_args(list(arguments))
    modes = {"--run": options.run, "--multirun": options.multirun, "--cfg": options.cfg, "--info": options.info}
    if len(asked := [flag for flag, on in modes.items() if on]) > 1:
        raise UserError(f"{' and '.join(asked)} cannot be given together; type one of them")
    if options.experimental_rerun:
        raise UserError("--experimental-rerun is not supported: it would execute what a file says; repeat the command")
    if options.resolve and not options.cfg and not options.help:
        raise UserError("--resolve belongs to --cfg; type --cfg job --resolve")
    if options.help or options.hydra_help or options.shell_completion or options.info:
        hand_over(arguments, verb)
        return 0
    composed = compose_checked(
        options.overrides,
        multirun=options.multirun,
        config_name=options.config_name,
        config_dir=options.config_dir,
    )
    if options.cfg or not composed[0].multirun:
        hand_over(arguments, verb)
        return 0
    return _sweep(verb, arguments, composed)


def _options_first(arguments: Sequence[str]) -> list[str]:
    """Overrides behind all options: Hydra reads none behind an option that follows one."""
    overrides = get_args_parser().parse_intermixed_args(list(arguments)).overrides
    rest = iter(overrides)
    following = next(rest, None)
    options = []
    for word in arguments:
        if word == following:
            following = next(rest, None)
        else:
            options.append(word)
    return [*options, *overrides]


@dataclass(frozen=True)
class Outcome:
    """How a job of a sweep ended: its overrides, exit code (0: finished) and, when it failed, the reason."""

    overrides: list[str]
    exit_code: int
    message: str


def _sweep(verb: str, arguments: Sequence[str], composed: Sequence[Composed]) -> int:
    """Run all jobs, however many fail, and name the failures at the end.

    Jobs may run in other processes or on other machines that share only the results folder, so each leaves a note of
    its outcome there; the notes are removed when all is well.
    """
    if any(argument.lstrip("+").startswith("hydra.sweep.dir=") for argument in arguments):
        raise UserError("hydra.sweep.dir is chosen by qprune sweep; set results_dir=... instead, the folder above it")
    options = get_args_parser().parse_args(list(arguments))
    results_dir = Path(composed[0].config.results_dir)
    remove_left_notes(results_dir / "multirun")
    folder = results_dir / "multirun" / uuid.uuid4().hex[:8]
    place = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    try:
        with notes_lock(folder):
            hand_over([*arguments, f"hydra.sweep.dir='{place}'"], verb)
    except Exception as error:
        launcher = [text for text in options.overrides if text.startswith("hydra/launcher=")]
        if isinstance(error, UserError) or not launcher or _outcomes(folder):
            raise
        raise UserError(
            f"{launcher[-1]} started no run: {error}; without it the runs follow each other here"
        ) from error
    finally:
        outcomes = _outcomes(folder)
        failed = [outcome for outcome in outcomes if outcome.exit_code]
        print(summary_text(options.overrides, options.config_dir))
        print(f"{len(outcomes)} runs: {len(outcomes) - len(failed)} finished, {len(failed)} failed")
        for outcome in failed:
            print(f"failed: {' '.join(outcome.overrides)}: {outcome.message}", file=sys.stderr)
    if failed:
        return failures.FAILURE
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _outcomes(folder: Path) -> list[Outcome]:
    notes = sorted(folder.glob("job-*.json"), key=lambda path: (len(path.name), path.name))
    return [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in notes]


def _job(cfg: DictConfig) -> None:
    """What Hydra calls, once per job, in this process or another."""
    job = HydraConfig.get()
    code, message = _attempt(cfg, wait=job.mode == RunMode.MULTIRUN)  # a sweep waits for another that has its run
    if job.mode == RunMode.MULTIRUN:
        note = {"overrides": list(job.overrides.task), "exit_code": code, "message": message}
        write_json(Path(job.sweep.dir) / f"job-{job.job.num}.json", note)
        if code != failures.STOPPED:
            return  # the jobs behind a failed one still run; not so behind one that was told to stop
    if code:
        sys.exit(code)  # passes through Hydra, which would report an exception in its own way


def _attempt(cfg: DictConfig, wait: bool) -> tuple[int, str]:
    """Exit code and, for a failure, its explanation, which has been printed."""
    try:
        from qprune.runs import execute as runner  # late: it imports torch, which --help and --cfg need not wait for

        runner.execute(cfg, wait=wait)
    except Exception as error:
        return failures.report(error)
    return 0, ""
