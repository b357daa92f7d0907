"""`qprune report`: one HTML page with tables, figures and all runs."""

import argparse
import webbrowser
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from qprune.atomic_write import own_place, write_atomically
from qprune.cli.failures import FAILURE
from qprune.cli.output import existing_results
from qprune.cli.tables import join_all, read_arithmetic
from qprune.config.compose import TABLE
from qprune.errors import UserError, counted
from qprune.runs.jobs import presets
from qprune.runs.store import Store
from qprune.training.progress import plain, print_text


def make(arguments: Sequence[str]) -> int:
    """Write the page and its figures. Exit code 1 when something was left out."""
    parser = argparse.ArgumentParser(
        "qprune report",
        description="Write one self-contained HTML page: tables, figures, configs and environments of the stored runs.",
        epilog="KEY=VALUE as for qprune tables: results_dir=..., task=..., seed=..., budget=smoke data=synthetic",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="results_dir=... and overrides for all tables")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in results_dir; figures/ beside it")
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="runs whose own figures are drawn (20)")
    parser.add_argument("--config-dir", metavar="DIR", help="a further folder of configs")
    options = parser.parse_intermixed_args(arguments)
    for word in options.keys:
        if "=" not in word:
            raise UserError(f"qprune report takes KEY=VALUE, not {word!r}; for example results_dir=results/runs")
    if options.runs < 0:
        raise UserError(f"--runs={options.runs} is not a whole number >= 0")
    folder, keys = existing_results(options.keys)
    output = Path(options.output) if options.output else folder / "report.html"
    figures = output.parent / "figures" if options.output else own_place(folder, "figures")
    store = Store.read(folder, read_arithmetic(keys))
    joined = join_all(presets(TABLE, options.config_dir), store, keys, options.config_dir)
    for package in ("jinja2", "matplotlib"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; type: pip install 'qprune[report]'")
    from qprune.reporting.report import page

    print_text(f"{counted(len(store.rows), 'run')} below {folder}: drawing the figures")
    with Console(stderr=True).status("") as status:
        text = page(store, joined, figures, options.runs, lambda what: status.update(plain(what)))
    write_atomically(output, text.encode(errors="backslashreplace"))
    print_text(f"report: {output}\nfigures: {figures}")
    for problem in store.problems:
        print_text(f"left out: {problem}", stderr=True)
    if options.open:
        webbrowser.open(output.resolve().as_uri())
    return FAILURE if store.problems else 0
