"""`qprune run` and `sweep`: one run, or one run per combination of values."""

import argparse
import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from qprune.cli import failures, multirun, signals
from qprune.cli.output import fold
from qprune.config.compose import Composer, key_of, resolved
from qprune.config.schema import RunConfig, json_schema, keys
from qprune.config.types import legal, schema_at
from qprune.errors import UserError
from qprune.runs.jobs import expand

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


def _start(verb: str, arguments: Sequence[str]) -> int:
    """Do what the arguments of `run` or `sweep` say, and return the exit code."""
    sys.argv = [f"qprune {verb}", *arguments]  # a run notes its command
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
        print(_section_text(config, options.package), end="")
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
    parser.add_argument("--package", "-p", metavar="SECTION", help="with --cfg: a section of the config")
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


def _section_text(config: dict[str, object], section: str | None) -> str:
    """Write a config, or a section of it, as YAML."""
    chosen = OmegaConf.create(config) if section is None else OmegaConf.select(OmegaConf.create(config), section)
    if not OmegaConf.is_config(chosen):
        raise UserError(f"--package {section} is no section of the config; type for example --package task")
    return OmegaConf.to_yaml(chosen)
