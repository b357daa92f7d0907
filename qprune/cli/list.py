"""`qprune list`: what there is to choose from, and the runs."""

import argparse
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from qprune.cli.output import fold, results_folder
from qprune.config.compose import SWEEP, TABLE, check_folder
from qprune.errors import UserError, one_of
from qprune.runs.jobs import presets

RUNS = "runs"
GROUPS = {"tasks": "task", "orders": "order", "protocols": "protocol", "schedules": "schedule"}
GROUPS |= {"budgets": "budget", "data": "data", "loggers": "logger", "launchers": "hydra/launcher"}
PRESETS = {"sweeps": (SWEEP, "qprune sweep +sweep=..."), "tables": (TABLE, "qprune tables ...")}


def show(arguments: Sequence[str]) -> int:
    """Print choices of groups with their first comment, or runs with their state."""
    parser = argparse.ArgumentParser(
        "qprune list",
        description="Print what there is to choose from; or, with the word runs, the runs below results_dir with their "
        "state and score.",
        epilog="KEY=VALUE narrows the list of runs: task=espcn, order=baseline, state=finished (or running, "
        "interrupted, failed, published), seed=range(3), or any key of the config such as quantize.bits=4. For "
        "example: qprune list runs task=espcn state=interrupted",
    )
    names = [*GROUPS, *PRESETS]
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help=f"{', '.join(names)}, runs, or KEY=VALUE; default: all but runs"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a further folder of configs")
    options = parser.parse_intermixed_args(arguments)
    check_folder(options.config_dir)
    keys = [word for word in options.what if "=" in word]
    words = [word for word in options.what if "=" not in word]
    for word in words:
        one_of("qprune list: WHAT", word, [*names, RUNS])
    if keys and RUNS not in words:
        raise UserError(f"{keys[0]} narrows the list of runs; type: qprune list runs {' '.join(keys)}")
    code = 0
    for place, word in enumerate(words or names):
        if place:
            print()
        if word == RUNS:
            from qprune.cli.list_runs import print_runs

            code = max(code, print_runs(*results_folder(keys)))
        else:
            print(_choices_text(word, options.config_dir))
    return code


def choices(group: str, config_dir: str | None = None) -> list[tuple[str, str]]:
    """List the choices of a group, those in a further folder included, with the first comment of each."""
    found = {}
    for folder in (Path(str(files("qprune.configs"))), *([Path(config_dir)] if config_dir else [])):
        for path in (folder / group).rglob("*.yaml"):
            name = path.relative_to(folder / group).with_suffix("").as_posix()
            found[name] = _first_comment(path.read_text(encoding="utf-8"))
    return sorted(found.items())


def _choices_text(word: str, config_dir: str | None) -> str:
    if word in PRESETS:
        kind, usage = PRESETS[word]
        found = [(name, _first_comment(text)) for name, text in presets(kind, config_dir).items()]
    else:
        found, usage = choices(GROUPS[word], config_dir), f"{GROUPS[word]}=..."
    width = max((len(name) for name, _ in found), default=0)
    lines = [fold(f"  {name:<{width}}  {description}", width + 4).rstrip() for name, description in found]
    return "\n".join([f"{word} ({usage})", *lines])


def _first_comment(text: str) -> str:
    comment = re.search(r"^# *([^@\s].*)", text, re.MULTILINE)  # not `# @package`, which is for Hydra
    return comment[1].strip() if comment else ""
