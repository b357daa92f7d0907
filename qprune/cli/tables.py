"""`qprune tables`: the paper's tables from stored rows, and the better order."""

import argparse
import itertools
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from qprune.atomic_write import own_place, write_atomically
from qprune.cli.failures import FAILURE
from qprune.cli.output import RESULTS_DIR, existing_results, table_file
from qprune.config.compose import TABLE, Composer, compose_run, decimal_from, text_override, values_of
from qprune.errors import UserError, one_of
from qprune.reporting import table_text, tables
from qprune.reporting.comparison import METHOD, PROTOCOLS, compare_orders, too_few_text
from qprune.reporting.table_text import in_markdown, missing_text, print_table
from qprune.reporting.tables import Joined, Part, TableRow, Wanted
from qprune.runs.jobs import presets, yaml_value
from qprune.runs.store import Store
from qprune.training.progress import print_text

ORDER = "order"


def show(arguments: Sequence[str]) -> int:
    """Print and write the tables. Exit code 1 when rows or parts were left out."""
    parser = argparse.ArgumentParser(
        "qprune tables",
        description="Join the stored rows with the paper's tables; print them and write Markdown, LaTeX and CSV.",
        epilog="task=NAME picks parts; seed=range(5) says which seeds must be there (default: 0; others count too); "
        "further KEY=VALUE hold for all rows, for example: qprune tables 4 task=espcn budget=smoke data=synthetic. "
        f"{ORDER} takes task, budget and data, protocol={'|'.join(PROTOCOLS)}, and margin=0.1, the difference that "
        "would matter, without which no equality is shown. arithmetic=1 reads the rows of that version alone.",
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"names of tables, {ORDER}, or KEY=VALUE; default: all")
    parser.add_argument("--run-missing", action="store_true", help="carry out the runs that are missing, then join")
    parser.add_argument("--all-pairs", action="store_true", help=f"{ORDER}: also the pairs of too few seeds to decide")
    parser.add_argument("--recovery", action="store_true", help="add columns: training left after the last events")
    parser.add_argument("--markdown", action="store_true", help="print Markdown in a terminal too")
    parser.add_argument("--output", metavar="DIR", help="where the files go; default: tables/ below results_dir")
    parser.add_argument("--config-dir", metavar="DIR", help="a further folder of configs, with tables in table/")
    options = parser.parse_intermixed_args(arguments)
    words = [word for word in options.what if "=" not in word]
    keys = [word for word in options.what if "=" in word]
    folder, keys = existing_results(keys, make=options.run_missing)
    arithmetic, margin = read_arithmetic(keys), _margin(keys)
    output = Path(options.output) if options.output else own_place(folder, "tables")
    sources = presets(TABLE, options.config_dir)
    for word in words:
        one_of("qprune tables: WHAT", word, [*sources, ORDER])
    chosen = {word: sources[word] for word in words if word != ORDER} if words else sources
    store = Store.read(folder, arithmetic)
    joined = join_all(chosen, store, keys, options.config_dir)
    code = 0
    if options.run_missing and (commands := [command for each in joined for command in each.missing]):
        code, store = _run(commands, folder, options.config_dir), Store.read(folder, arithmetic)
        joined = join_all(chosen, store, keys, options.config_dir)
    for each in joined:
        texts = {
            "md": table_text.markdown(each.table, each.parts, options.recovery),
            "tex": table_text.latex(each.table, each.parts, options.recovery),
            "csv": table_text.csv(each.parts),
        }
        for suffix, text in texts.items():
            path = output / f"{table_file(each.table.name, keys)}.{suffix}"
            write_atomically(path, text.encode(errors="backslashreplace"))
        if options.markdown or options.recovery or not sys.stdout.isatty():
            print_text(texts["md"])
        else:
            print_table(Console(), each.table, each.parts)
    for each in joined:
        print_text(f"written: {output / table_file(each.table.name, keys)}.md, .tex and .csv")
    if ORDER in words or not words:
        print_text(_order_text(store, output, keys, margin, options.all_pairs))
    parts = [part for each in joined for part in each.parts]
    train = ["qprune", "tables", *(word for word in options.what if word != ORDER), "--run-missing"]
    if missing := missing_text(parts, shlex.join(train)):
        print_text(missing)
    for problem in store.problems:
        print_text(f"left out: {problem}", stderr=True)
    if chosen and store.rows and not any((part["n"] > 0).any() for part in parts):
        row = next(iter(store.rows.values()))
        more = [f"budget={row.budget}"] if row.budget != "paper" else []
        more += [f"data={row.data_source}"] if row.data_source != "real" else []
        keys_text = shlex.join([*more, text_override(RESULTS_DIR, str(folder))])
        print_text(
            f"none of the {len(store.rows)} rows below {folder} is in these tables; rows of another budget or data are "
            f"shown, with notes, by: qprune tables {keys_text}",
            stderr=True,
        )
    return FAILURE if store.problems else code


def join_all(sources: Mapping[str, str], store: Store, keys: Sequence[str], config_dir: str | None) -> list[Joined]:
    """Join tables with the stored rows; what is wrong goes to the store's problems.

    sources: YAML by name of the table. keys: overrides for all rows; `task` picks parts, `seed` the seeds to be there.
    """
    keys = list(keys)
    task, seeds = take(keys, "task", ""), take(keys, "seed", "0")
    for key in keys:
        if (group := key.partition("=")[0].lstrip("+")) in ("order", "schedule"):
            raise UserError(f"{key}: a table's rows have their own {group}; leave it out")
    if keys or task:
        compose_run([*([f"task={task}"] if task else []), *keys], config_dir)  # errors with advice
    joined = []
    with Composer(config_dir) as composer:
        rows = _Rows(composer, store, _seeds(composer, seeds), keys)
        for name, text in sources.items():
            try:
                table = tables.table_from(name, yaml_value(text, f"table {name}"))
            except UserError as error:
                store.problems.append(str(error))
                continue
            parts, missing = [], []
            for part in [part for part in table.parts if task in ("", part.task)]:
                try:
                    wanted = rows.wanted(part)
                except UserError as error:
                    store.problems.append(f"table {name}, {part.name}: {error}")
                    continue
                parts.append(tables.join(part, wanted, store))
                runs = [want.signatures[seed] for want in wanted for seed in want.seeds]
                missing += [words for run in runs if run not in store.rows for words in rows.commands[run]]
            if parts:
                joined.append(Joined(table, parts, missing))
    return joined


@dataclass(frozen=True)
class _Rows:
    """The runs that the rows of tables need."""

    composer: Composer
    store: Store
    seeds: list[int]
    keys: list[str]  # overrides for all rows
    # By signature, arguments of `qprune run`: for the run, and before it for its source of fraction bits
    commands: dict[str, list[list[str]]] = field(default_factory=dict)

    def wanted(self, part: Part) -> list[Wanted]:
        """Name the runs of every row of a part, and check their stored rows."""
        found = [self._signatures(part, row) for row in part.rows]
        self.store.check([name for signatures in found for name in signatures.values()])
        wanted = []
        for row, signatures in zip(part.rows, found, strict=True):
            missing = [str(seed) for seed in self.seeds if signatures[seed] not in self.store.rows]
            words = [*part.overrides, *row.overrides, *self.keys]
            place = text_override(RESULTS_DIR, str(self.store.folder))
            words += [f"seed={','.join(missing or map(str, self.seeds))}", place]
            command = f"qprune {'sweep' if missing[1:] else 'run'} {shlex.join(words)}"
            if row.decimal_from:  # of each seed first the run whose fraction bits are used
                runs = [run for seed in missing or self.seeds for run in self.commands[signatures[int(seed)]]]
                command = " && ".join(f"qprune run {shlex.join([*run, place])}" for run in runs)
            wanted.append(Wanted(row, signatures, self.seeds, command))
        return wanted

    def _signatures(self, part: Part, row: TableRow) -> dict[int, str]:
        words = [*part.overrides, *row.overrides, *self.keys]
        source_words = [*part.overrides, *row.decimal_from, *self.keys] if row.decimal_from else []
        config, signatures = self.composer.config(words), {}
        for seed in sorted({*self.seeds, *self.store.seeds.get((config.order.name, config.task.name), ())}):
            source = self.composer.signature(source_words, seed) if source_words else None
            signatures[seed] = self.composer.signature(words, seed, source)
            own = [*words, *([decimal_from(source)] if source else []), f"seed={seed}"]
            before = [[*source_words, f"seed={seed}"]] if source else []
            self.commands[signatures[seed]] = [*before, own]
        return signatures


def _order_text(store: Store, output: Path, keys: Sequence[str], margin: float | None, all_pairs: bool) -> str:
    """Compare the orders in sentences with their marks, and write order.md.

    Of the keys, `task`, `budget`, `data` and `protocol` pick runs. Without `all_pairs`, comparisons of too few seeds to
    decide share a line.
    """
    given = dict(key.split("=", 1) for key in keys)
    names = {"task": "task", "budget": "budget", "data": "data_source"}
    wanted = {field: given[key] for key, field in names.items() if key in given}
    found = compare_orders(store, given.get("protocol"), margin, **wanted)
    if margin is not None and len(metrics := {comparison.metric for comparison in found}) > 1:
        units = ", ".join(sorted(metrics))
        raise UserError(f"margin={margin:g} is in the unit of one score, not of {units}; add task=...")
    lines = ["## Which order is better", ""]
    for heading, group in itertools.groupby(found, key=lambda comparison: comparison.heading):
        comparisons = list(group)
        shown = [comparison for comparison in comparisons if all_pairs or comparison.can_decide]
        lines += [f"### {in_markdown(heading)}", ""]
        for comparison in shown:
            marks = f" [{'; '.join(comparison.marks)}]" if comparison.marks else ""
            lines.append(in_markdown(f"- {comparison.sentence()}{marks}"))
        if few := len(comparisons) - len(shown):
            lines.append(f"- {too_few_text(few)}; shown by: qprune tables {ORDER} --all-pairs")
        lines.append("")
    lines += [METHOD] if found else ["no seed has been trained in both orders with the same settings"]
    text = "\n".join([*lines, ""])
    write_atomically(output / "order.md", text.encode(errors="backslashreplace"))
    return text


def _run(commands: Sequence[Sequence[str]], folder: Path, config_dir: str | None) -> int:
    """Carry out runs, each once; the exit code is 1 when one of them failed."""
    from qprune.cli.run import run

    unique = list(dict.fromkeys(tuple(command) for command in commands))
    extra = ["--config-dir", config_dir] if config_dir else []
    failed = False
    for i, command in enumerate(unique, 1):
        print_text(f"missing run {i} of {len(unique)}: {' '.join(command)}")
        try:
            failed |= bool(run([*extra, *command, text_override(RESULTS_DIR, str(folder))]))
        except SystemExit as stop:
            failed |= bool(stop.code)
        except UserError as error:
            print_text(f"error: {error}", stderr=True)
            failed = True
    return FAILURE if failed else 0


def take(keys: list[str], name: str, default: str) -> str:
    """Take the key `name` out of `keys` and return its value; the last one counts."""
    found = [key for key in keys if key.partition("=")[0] == name]
    keys[:] = [key for key in keys if key not in found]
    return found[-1].partition("=")[2] if found else default


def read_arithmetic(keys: list[str]) -> int | None:
    """Take the key `arithmetic` out of `keys` and return the version, or None."""
    text = take(keys, "arithmetic", "")
    if text and not re.fullmatch("[1-9][0-9]{0,8}", text):
        raise UserError(f"arithmetic={text} is no version of the arithmetic; type a whole number >= 1")
    return int(text) if text else None


def _margin(keys: list[str]) -> float | None:
    text = take(keys, "margin", "")
    try:
        margin = float(text) if text else None
    except ValueError:
        margin = 0.0
    if margin is not None and not 0 < margin < math.inf:
        raise UserError(f"margin={text} is no difference of scores; type a number > 0, such as margin=0.1")
    return margin


def _seeds(composer: Composer, text: str) -> list[int]:
    [override] = composer.parse([f"seed={text}"])
    values = [override.value() for override in composer.parse(values_of(override))]
    seeds = {value for value in values if isinstance(value, int) and value >= 0}
    if len(seeds) != len(values):
        raise UserError(f"seed={text} is not a list of whole numbers >= 0; type for example seed=range(5) or seed=0,1")
    return sorted(seeds)
