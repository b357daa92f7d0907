"""Joined tables as text: for a terminal, Markdown, LaTeX, CSV, and the cells that the report shows."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from qprune.atomic_write import csv_bytes
from qprune.errors import visible
from qprune.reporting.tables import COSTS, Table
from qprune.training.progress import plain

_TERMINAL_HEADINGS = ("score", "n", "paper", "diff", "Mb", "density", "paper")
HEADINGS = (
    *("recipe", "score", "n", "paper", "difference", "weights Mb (paper | actual)", "features Mb (paper | actual)"),
    *("density (paper's accounting | actual)", "paper's density"),
)
RECOVERY_HEADINGS = ("epochs after the last P | Q", "sum of their learning rates")
_COST_HEADINGS = ("effective GBOPs", "density per effective BOP")
_LATEX = {"\\": r"\textbackslash{}", "->": r"$\to$", "±": r"$\pm$", "|": r"$\mid$", "<": r"\textless{}"}
_LATEX |= {">": r"\textgreater{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "%&$#_{}"}


@dataclass(frozen=True)
class Cells:
    """A part of a table as text."""

    heading: str
    lines: list[list[str]]
    best: list[bool]
    notes: list[str]
    missing: list[tuple[str, str]]  # label and command of rows that lack runs


def layout(parts: Sequence[pd.DataFrame], recovery: bool = False) -> tuple[tuple[str, ...], list[Cells]]:
    """Return the headings of a table, and its parts as text; columns of costs are there where a run has them.

    recovery: whether the columns RECOVERY_HEADINGS are wanted.
    """
    costs = any(bool(part[name].notna().any()) for part in parts for name in COSTS)
    headings = HEADINGS + (_COST_HEADINGS if costs else ()) + (RECOVERY_HEADINGS if recovery else ())
    return headings, [cells(part, costs, recovery) for part in parts]


def cells(part: pd.DataFrame, costs: bool = False, recovery: bool = False) -> Cells:
    """Write every cell of a joined part as text; marks become footnotes a, b, ..."""
    notes = list(dict.fromkeys(mark for marks in part["marks"] for mark in marks))
    rows = part.to_dict("records")
    lines = []
    for row in rows:
        score = with_deviation(row["score"], row["score_sd"])
        score = score if row["n"] or not row["missing_seeds"] else "missing"
        line = [_label(row, notes), score, str(row["n"]) if row["command"] else ""]
        line += [row["printed_score"], number(row["difference"], sign=True)]
        line += [_pair(number(row[f"{k}_paper"]), number(row[f"{k}_actual"])) for k in ("weight_mb", "feature_mb")]
        densities = (with_deviation(row[f"density_{k}"], row[f"density_{k}_sd"]) for k in ("paper", "actual"))
        line += [_pair(*densities), row["printed_density"], *(number(row[name]) for name in COSTS if costs)]
        if recovery:
            for kind, form in (("epochs", ".4g"), ("rates", ".3g")):
                left = (row[f"{kind}_after_{name}"] for name in ("pruning", "quantization"))
                line.append(_pair(*("" if math.isnan(value) else f"{value:{form}}" for value in left)))
        lines.append(line)
    heading = "{part}: score in {unit}, density in {density_unit}".format_map(rows[0])
    missing = [(row["label"], row["command"]) for row in rows if row["missing_seeds"]]
    return Cells(heading, lines, part["best"].tolist(), notes, missing)


def markdown(table: Table, parts: Sequence[pd.DataFrame], recovery: bool = False) -> str:
    """Write a whole table as GitHub's Markdown. recovery: as for `layout`."""
    text = [f"## Table {table.name}. {in_markdown(table.title)}", ""]
    headings, shown = layout(parts, recovery)
    for part in shown:
        rule = ["---", *["---:"] * (len(headings) - 1)]
        text += [f"### {in_markdown(part.heading)}", "", _md_line(headings), _md_line(rule)]
        text += [_md_line(line, 2 if best else 0) for line, best in zip(part.lines, part.best, strict=True)]
        text.append("")
        text += [in_markdown(f"- [{letter(i)}] {note}") for i, note in enumerate(part.notes)]
        text += [f"- missing: {in_markdown(label)}: {_code(command)}" for label, command in part.missing]
        text += [""] if part.notes or part.missing else []
    return "\n".join(text)


def latex(table: Table, parts: Sequence[pd.DataFrame], recovery: bool = False) -> str:
    r"""Write a whole table for LaTeX (package booktabs) as one `tabular`. recovery: as for `layout`."""
    headings, laid_out = layout(parts, recovery)
    columns = "l" + "r" * (len(headings) - 1)
    text = [r"\begin{table}", r"\centering", rf"\caption{{{_escaped(table.title)}}}"]
    text += [rf"\label{{tab:{table.name}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    text.append(" & ".join(map(_escaped, headings)) + r" \\")
    notes: list[str] = []
    for part in laid_out:
        text += [r"\midrule", rf"\multicolumn{{{len(headings)}}}{{l}}{{\textit{{{_escaped(part.heading)}}}}} \\"]
        for line, best in zip(part.lines, part.best, strict=True):
            shown = [_escaped(cell) for cell in line]
            shown[:2] = [rf"\textbf{{{cell}}}" if best else cell for cell in shown[:2]]
            text.append(" & ".join(shown) + r" \\")
        head = part.heading.partition(":")[0]
        notes += [rf"{_escaped(f'{head} [{letter(i)}] {note}')}\\" for i, note in enumerate(part.notes)]
    text += [r"\bottomrule", r"\end{tabular}"]
    text += [r"\par\smallskip\footnotesize\raggedright", *notes] if notes else []
    return "\n".join([*text, r"\end{table}", ""])


def print_table(console: Console, table: Table, parts: Sequence[pd.DataFrame]) -> None:
    """Print a table: sizes as stored, densities as the paper counts; rows without a run have no score."""
    console.print(plain(f"Table {table.name}. {table.title}"), style="bold")
    for part in parts:
        rows = part.to_dict("records")
        notes = list(dict.fromkeys(mark for row in rows for mark in row["marks"]))
        title = plain("{part}: {unit}".format_map(rows[0]))
        grid = Grid(Column(title), box=None, pad_edge=False, header_style="dim")
        for heading in _TERMINAL_HEADINGS:
            grid.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            style = "bold" if row["best"] else "" if row["n"] or not row["command"] else "dim"
            grid.add_row(*map(plain, [_label(row, notes), *_terminal_cells(row)]), style=style)
        console.print(grid)
        for place, note in enumerate(notes):
            console.print(plain(f"  [{letter(place)}] {note}"))
        console.print()


def missing_text(parts: Sequence[pd.DataFrame], command: str) -> str:
    """Say in a line how many rows lack runs, and how to train them; nothing where all are there."""
    rows = [row for part in parts for row in part.to_dict("records") if row["command"]]
    missing = sum(bool(row["missing_seeds"]) for row in rows)
    verb = "lacks" if missing == 1 else "lack"
    return f"{missing} of {len(rows)} rows {verb} runs; to train them: {command}" if missing else ""


def _terminal_cells(row: Mapping[Any, Any]) -> list[str]:
    own = "actual" if row["n"] else "paper"  # other methods have the paper's sizes alone
    size = row[f"weight_mb_{own}"] + row[f"feature_mb_{own}"]
    return [
        with_deviation(row["score"], row["score_sd"]),
        str(row["n"]) if row["n"] else "",
        row["printed_score"],
        number(row["difference"], sign=True),
        "" if math.isnan(size) else f"{size:.1f}",
        number(row["density_paper"]),
        row["printed_density"],
    ]


def csv(parts: Sequence[pd.DataFrame]) -> str:
    """Write all parts in full precision; columns of costs are there where a run has costs."""
    table = pd.concat(parts, ignore_index=True).drop(columns=["printed_score", "printed_density"])
    table = table.drop(columns=[name for name in COSTS if not table[name].notna().any()])
    for column in ("marks", "missing_seeds"):
        table[column] = ["; ".join(map(str, values)) for values in table[column]]
    return csv_bytes(table).decode()


def number(value: float, sign: bool = False) -> str:
    """Write two decimals, or four of a number below 1 without sign; nothing for NaN."""
    decimals = 2 if sign or abs(value) >= 1 or value == 0 else 4
    return "" if math.isnan(value) else f"{value:{'+' if sign else ''}z.{decimals}f}"


def with_deviation(value: float, deviation: float) -> str:
    """Write a mean, and its deviation where there is one."""
    return number(value) + ("" if math.isnan(deviation) else f" ± {deviation:.2f}")


def _label(row: Mapping[Any, Any], notes: Sequence[str]) -> str:
    """Return the label of a row with the letters of its footnotes."""
    letters = ",".join(letter(notes.index(mark)) for mark in row["marks"])
    return f"{row['label']} [{letters}]" if letters else str(row["label"])


def letter(index: int) -> str:
    """Return the letters of a footnote: a, b, ... z, aa, ab, ..."""
    head = letter(index // 26 - 1) if index >= 26 else ""
    return head + "abcdefghijklmnopqrstuvwxyz"[index % 26]


def _pair(first: str, second: str) -> str:
    return f"{first or '-'} | {second or '-'}" if first or second else ""


def _escaped(text: str) -> str:
    found = re.sub(r"->|[±\\%&$#_{}|<>~^]", lambda match: _LATEX[match.group()], visible(text))
    return f"{{}}{found}" if found.startswith(("[", "*")) else found  # behind \\ they would be its arguments


def in_markdown(text: str) -> str:
    """Escape what Markdown reads as markup, but for the footnotes [a]."""
    return re.sub(r"[\\`*<|$]|&(?=#?\w+;)|\](?=[(:\[])|(?<!\w)_|_(?!\w)|~~", r"\\\g<0>", visible(text))


def _code(text: str) -> str:
    """Write code in Markdown, between more backticks than it has."""
    return f"`` {visible(text)} ``" if "`" in text else f"`{visible(text)}`"


def _md_line(line: Sequence[str], bold: int = 0) -> str:
    cells = [in_markdown(cell) for cell in line]
    return f"| {' | '.join([*(f'**{cell}**' for cell in cells[:bold]), *cells[bold:]])} |"
