"""`qprune run`, `sweep` and `plan`: one run, or one per combination of values, carried out or described."""

import argparse
import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from qprune.cli import failures, multirun, signals
from qprune.cli.output import fold
from qprune.config.compose import Composer, compose_run, key_of, resolved
from qprune.config.schema import RunConfig, json_schema, keys
from qprune.config.types import legal, schema_at
from qprune.errors import UserError, counted
from qprune.runs.jobs import expand, jobs_of, seconds_left, time_left_text
from qprune.training.progress import duration, print_text

_DESCRIPTIONS = {
    "run": "Train one recipe, or find it finished, and print its result row. Results go below results_dir.",
    "sweep": "Train the recipes of all combinations of values that are not finished yet, and print a summary.",
}
_EXAMPLES = {
    "run": "task=espcn data=synthetic budget=smoke",
    "sweep": 'task=espcn order=prune_first,quantize_first "seed=range(5)"',
}


def run(arguments: Sequence[str]) -> int:
    """Carry out one run, or with -m a sweep; print a config with --cfg."""
    return _start("run", arguments)


def sweep(arguments: Sequence[str]) -> int:
    """Carry out one run per combination of the values that are given."""
    return _start("sweep", arguments)


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


def _start(verb: str, arguments: Sequence[str]) -> int:
    """Do what the arguments of `run` or `sweep` say, and return the exit code."""
    sys.argv = [f"qprune {verb}", *arguments]  # a run notes the command that trains it
    options = _parser(verb).parse_intermixed_args(list(arguments))
    if options.help:
        print(_help(verb, options.config_dir), end="")
        return 0
    if not arguments:
        raise UserError(failures.NOTHING_TYPED.format(verb=verb, example=_EXAMPLES[verb]))
    is_sweep = verb == "sweep" or options.multirun
    if is_sweep and options.cfg:
        raise UserError("--cfg prints the config of one run; type: qprune run KEY=VALUE ... --cfg job")
    overrides = expand(options.overrides, options.config_dir)
    with Composer(options.config_dir) as composer:
        of_hydra = [text for text in overrides if key_of(text).startswith("hydra")]
        first = [*of_hydra, *composer.jobs(overrides)[0]] if is_sweep else overrides
        config = resolved(composer.compose(first))
    if options.cfg:
        print(OmegaConf.to_yaml(OmegaConf.create(config)), end="")
        return 0
    if is_sweep:
        return multirun.run_all(overrides, options.config_dir)
    checked = RunConfig.check(config)
    from qprune.runs import execute as runner  # late: it imports torch, and the checks above need not wait for it

    signals.stop_if_asked()
    runner.execute(checked)
    return 0


def _parser(verb: str) -> argparse.ArgumentParser:
    text = f"{_DESCRIPTIONS[verb]} For example: qprune {verb} {_EXAMPLES[verb]}"
    parser = argparse.ArgumentParser(f"qprune {verb}", description=text, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="choices of groups and values of keys")
    parser.add_argument("--help", "-h", action="store_true", help="print this text")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a further folder of configs")
    parser.add_argument("--multirun", "-m", action="store_true", help="one run per combination of values")
    parser.add_argument("--cfg", "-c", choices=("job",), help="print the config, and run nothing")
    return parser


def _help(verb: str, config_dir: str | None) -> str:
    """Return usage and flags, groups with their choices, and keys with their meaning."""
    lines = ["groups (GROUP=CHOICE):"]
    with Composer(config_dir) as composer:
        lines += [f"  {group}: {', '.join(composer.choices(group))}" for group in composer.groups]
    lines += ["", "keys (KEY=VALUE); the keys of a task are in its YAML, and --cfg job prints all values:"]
    for key, field in keys():
        found = legal(schema_at(json_schema(), key))
        lines.append(f"  {key}: {field.description}{f' ({found})' if found else ''}")
    return "\n".join([_parser(verb).format_help(), *(fold(line, 6) for line in lines), ""])


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
