"""`qprune list`: what there is to choose from, and the runs that are finished."""

import argparse
import re
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qprune.cli.exit_codes import FAILURE
from qprune.errors import UserError, one_of
from qprune.runs.folder import read_rows
from qprune.runs.row import Row, row_cells

GROUPS = {"tasks": "task", "orders": "order", "protocols": "protocol", "schedules": "schedule"}
GROUPS |= {"budgets": "budget", "data": "data"}
RESULTS = "results_dir="
RIGHT = ("seed", "score", "weights Mb", "features Mb", "density")  # columns of numbers


def show(arguments: Sequence[str]) -> int:
    """Print choices of groups with their first comment, or rows of finished runs."""
    parser = argparse.ArgumentParser(
        "qprune list", description="Print what there is to choose from, or the finished runs below results_dir."
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"{', '.join(GROUPS)} or runs; default: all but runs")
    options = parser.parse_intermixed_args(arguments)
    folder = next((word.removeprefix(RESULTS) for word in options.what if word.startswith(RESULTS)), "results/runs")
    wanted = [word for word in options.what if not word.startswith(RESULTS)] or list(GROUPS)
    for word in wanted:
        one_of("qprune list: WHAT", word, [*GROUPS, "runs"])
    return max([_print_runs(Path(folder)) if word == "runs" else _print_group(word) for word in wanted])


def choices(group: str) -> list[tuple[str, str]]:
    """List the choices of a group of qprune, with the first comment of each."""
    folder = Path(str(files("qprune.configs"))) / group
    found = []
    for path in folder.rglob("*.yaml"):
        comment = re.search(r"^# *([^@\s].*)", path.read_text(encoding="utf-8"), re.MULTILINE)  # not `# @package`
        found.append((path.relative_to(folder).with_suffix("").as_posix(), comment[1].strip() if comment else ""))
    return sorted(found)


def _print_group(word: str) -> int:
    found = choices(GROUPS[word])
    width = max((len(name) for name, _ in found), default=0)
    print(f"{word} ({GROUPS[word]}=...)")
    for name, description in found:
        print(f"  {name:<{width}}  {description}".rstrip())
    return 0


def _print_runs(folder: Path) -> int:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds the runs with {RESULTS}...")
    rows, problems = read_rows(folder)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width to fit into
    console.print(rows_table(rows) if rows else f"no finished runs below {folder}")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return FAILURE if problems else 0


def rows_table(rows: Sequence[Row]) -> Table:
    """Return rows for people, one line each, without their marks."""
    table = Table(box=None, pad_edge=False)
    *headings, _ = row_cells(rows[0])
    for heading in headings:
        table.add_column(heading, justify="right" if heading in RIGHT else "left")
    for row in rows:
        table.add_row(*map(row_cells(row).get, headings))
    return table
