"""`qprune tables`: the paper's tables from stored rows, what is missing, and the answer to the order question."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from qprune.atomic_write import write_atomically
from qprune.cli.exit_codes import FAILURE
from qprune.config.compose import TABLE, Composer, compose_run, decimal_from
from qprune.errors import UserError, one_of
from qprune.reporting import rendering
from qprune.reporting.tables import Part, Table, TableRow, Wanted, join, table_from
from qprune.runs.jobs import presets, yaml_value
from qprune.runs.store import Store

ORDER = "order"
DEFAULT_RESULTS = "results/runs"


@dataclass(frozen=True)
class Joined:
    """A table with its parts joined, and the runs that are missing, as arguments of `qprune run`."""

    table: Table
    parts: list[pd.DataFrame]
    missing: list[list[str]]


def show(arguments: Sequence[str]) -> int:
    """Print the tables and write them as Markdown, LaTeX and CSV. Exit code 1 when rows or parts were left out."""
    parser = argparse.ArgumentParser(
        "qprune tables",
        description="Join the stored rows with the paper's tables; print them and write Markdown, LaTeX and CSV.",
        epilog="task=NAME picks parts; seed=range(5) says which seeds must be there (default: 0; others count too); "
        "further KEY=VALUE hold for all rows, for example: qprune tables 4 task=espcn budget=smoke data=synthetic",
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"names of tables, {ORDER}, or KEY=VALUE; default: all")
    parser.add_argument("--run-missing", action="store_true", help="carry out the runs that are missing, then join")
    parser.add_argument("--all-pairs", action="store_true", help=f"{ORDER}: also the pairs of too few seeds to decide")
    parser.add_argument("--output", metavar="DIR", help="where the files go; default: tables/ beside results_dir")
    parser.add_argument("--config-dir", help="a further folder of configs, with tables in its folder table/")
    options = parser.parse_intermixed_args(arguments)
    words = [word for word in options.what if "=" not in word]
    keys = [word for word in options.what if "=" in word]
    folder = Path(taken(keys, "results_dir", DEFAULT_RESULTS))
    output = Path(options.output) if options.output else folder.parent / "tables"
    sources = table_files(options.config_dir)
    for word in words:
        one_of("qprune tables: WHAT", word, [*sources, ORDER])
    names = [word for word in words if word != ORDER] or ([] if words else list(sources))
    if options.run_missing:
        folder.mkdir(parents=True, exist_ok=True)
    store = Store.read(folder)
    joined = join_all(names, sources, store, keys, options.config_dir)
    code = 0
    if options.run_missing and (commands := [command for entry in joined for command in entry.missing]):
        code = _run(commands, folder, options.config_dir)
        store = Store.read(folder)
        joined = join_all(names, sources, store, keys, options.config_dir)
    for entry in joined:
        print(write(entry, output))
    if ORDER in words or not words:
        print(order_text(store, output, options.all_pairs))
    for problem in store.problems:
        print(f"left out: {problem}", file=sys.stderr)
    if names and not any((part["n"] > 0).any() for entry in joined for part in entry.parts) and store.rows:
        print(_advice(store), file=sys.stderr)
    return FAILURE if store.problems else code


def table_files(config_dir: str | None) -> dict[str, str]:
    """Read the YAML of every table by its name: those of qprune, and those in the folder table/ of config_dir."""
    return presets(TABLE, config_dir)


def join_all(
    names: Sequence[str], sources: dict[str, str], store: Store, keys: Sequence[str], config_dir: str | None = None
) -> list[Joined]:
    """Join these tables with the store. keys: overrides for all rows; `task` picks parts, `seed` what must be there.

    What is wrong with a table or a part (an unknown task, say) is added to the store's problems, and the rest joined.
    """
    keys = list(keys)
    task, seed_text = taken(keys, "task", ""), taken(keys, "seed", "0")
    for key in keys:
        if key.partition("=")[0].lstrip("+") in ("order", "schedule"):
            raise UserError(f"{key}: a table's rows have their own {key.partition('=')[0]}; leave it out")
    if keys or task:
        compose_run([*([f"task={task}"] if task else []), *keys], config_dir)  # errors with advice
    joined = []
    with Composer(config_dir) as composer:
        seeds = _seeds(composer, seed_text)
        for name in names:
            try:
                table = table_from(name, yaml_value(sources[name], f"table {name}"))
            except UserError as error:
                store.problems.append(str(error))
                continue
            parts, missing = [], []
            for part in table.parts:
                if task and part.task != task:
                    continue
                try:
                    wanted = [_wanted(composer, part, row, store, seeds, keys) for row in part.rows]
                except UserError as error:
                    store.problems.append(f"table {name}, {part.name}: {error}")
                    continue
                store.check([signature for want in wanted for signature in want.signatures.values()])
                parts.append(join(part, wanted, store))
                missing += [entry for want in wanted for entry in _missing(composer, part, want, store, keys)]
            if parts:
                joined.append(Joined(table, parts, missing))
    return joined


def write(entry: Joined, output: Path) -> str:
    """Write the files of a table and return its Markdown."""
    name, title = entry.table.name, entry.table.title
    text = rendering.markdown(name, title, entry.parts)
    for suffix, content in (
        ("md", text),
        ("tex", rendering.latex(name, title, entry.parts)),
        ("csv", rendering.csv(entry.parts)),
    ):
        write_atomically(output / f"table{name}.{suffix}", content.encode())
    return text


def order_text(store: Store, output: Path | None = None, all_pairs: bool = False) -> str:
    """The comparison of orders as sentences, each with its marks; written to order.md as well.

    all_pairs: whether those of too few seeds to decide get sentences too; else they share a line.
    """
    from qprune.reporting.comparison import compare_orders, too_few_text

    found = compare_orders(store)
    told = [comparison for comparison in found if all_pairs or comparison.can_decide]
    lines = ["## Which order is better", ""]
    for comparison in told:
        marks = f" [{'; '.join(comparison.marks)}]" if comparison.marks else ""
        lines.append(f"- {comparison.sentence()}{marks}")
    if few := len(found) - len(told):
        lines.append(f"- {too_few_text(few)}; shown by: qprune tables {ORDER} --all-pairs")
    if not found:
        lines.append("no seed has been trained in both orders with the same settings")
    text = "\n".join([*lines, ""])
    if output is not None:
        write_atomically(output / "order.md", text.encode())
    return text


def _wanted(
    composer: Composer, part: Part, row: TableRow, store: Store, seeds: Sequence[int], keys: Sequence[str]
) -> Wanted:
    overrides = [*part.overrides, *row.overrides, *keys]
    config = composer.cached(overrides)
    signatures = {
        seed: composer.signature(overrides, seed, _source_of(composer, part, row, seed, keys))
        for seed in sorted({*seeds, *store.seeds(config.order.name, config.task.name)})
    }
    missing = [seed for seed in seeds if signatures[seed] not in store.rows]
    verb, several = ("sweep", ",".join(map(str, missing))) if len(missing) > 1 else ("run", "".join(map(str, missing)))
    source = f"quantize.decimal_from=<signature of the run with {' '.join(row.decimal_from or ())}>"
    words = [*overrides, *([source] if row.decimal_from else []), f"seed={several}"]
    command = f"qprune {verb} {shlex.join([*words, f'results_dir={store.folder}'])}"
    return Wanted(row, signatures, seeds, command)


def _source_of(composer: Composer, part: Part, row: TableRow, seed: int, keys: Sequence[str]) -> str | None:
    """With `decimal_from`, the signature of a row's source with the same seed."""
    if not row.decimal_from:
        return None
    return composer.signature([*part.overrides, *row.decimal_from, *keys], seed)


def _missing(composer: Composer, part: Part, want: Wanted, store: Store, keys: Sequence[str]) -> list[list[str]]:
    """The missing runs of a row as arguments of `qprune run`; a source of decimal bits stands before its user."""
    found = []
    for seed in want.seeds:
        if want.signatures[seed] in store.rows:
            continue
        words = [*part.overrides, *want.row.overrides, *keys]
        if want.row.decimal_from and (source := _source_of(composer, part, want.row, seed, keys)):
            found.append([*part.overrides, *want.row.decimal_from, *keys, f"seed={seed}"])
            words.append(decimal_from(source))
        found.append([*words, f"seed={seed}"])
    return found


def _run(commands: Sequence[Sequence[str]], folder: Path, config_dir: str | None) -> int:
    """Carry out runs one after the other, each once; the exit code is 1 when one of them failed."""
    from qprune.cli.run import run

    unique = list(dict.fromkeys(tuple(command) for command in commands))
    failed = 0
    for i, command in enumerate(unique, 1):
        print(f"missing run {i} of {len(unique)}: {' '.join(command)}", flush=True)
        extra = ["--config-dir", config_dir] if config_dir else []
        try:
            failed += bool(run([*extra, *command, f"results_dir={folder}"]))
        except SystemExit as stop:
            failed += bool(stop.code)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    return FAILURE if failed else 0


def taken(keys: list[str], name: str, default: str) -> str:
    """The value of the key `name` in `keys`, which is taken out of them; the last one counts."""
    found = [key for key in keys if key.partition("=")[0] == name]
    for key in found:
        keys.remove(key)
    return found[-1].partition("=")[2] if found else default


def _seeds(composer: Composer, text: str) -> list[int]:
    [override] = composer.parse([f"seed={text}"])
    values = [override.value()]
    if override.is_sweep_override():
        values = [composer.parse([f"seed={value}"])[0].value() for value in override.sweep_string_iterator()]
    seeds = {value for value in values if isinstance(value, int) and value >= 0}
    if len(seeds) != len(values):
        raise UserError(f"seed={text} is not a list of whole numbers >= 0; type for example seed=range(5) or seed=0,1")
    return sorted(seeds)


def _advice(store: Store) -> str:
    """What to add for the rows that are there, when the tables want others."""
    row = next(iter(store.rows.values()))
    words = [f"budget={row.budget}"] if row.budget != "paper" else []
    words += [f"data={row.data_source}"] if row.data_source != "real" else []
    return (
        f"none of the {len(store.rows)} rows below {store.folder} is in these tables; rows of another budget or data "
        f"are shown, with marks, by: qprune tables {' '.join([*words, f'results_dir={store.folder}'])}"
    )
