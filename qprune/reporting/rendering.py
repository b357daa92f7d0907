"""Joined tables as Markdown, LaTeX (booktabs) and CSV; every mark becomes a footnote."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

HEADINGS = (
    "recipe",
    "score",
    "n",
    "paper",
    "difference",
    "weights Mb (paper | actual)",
    "features Mb (paper | actual)",
    "density (paper's accounting | actual)",
    "paper's density",
)
_LATEX = {"\\": r"\textbackslash{}", "->": r"$\to$", "+-": r"$\pm$", "|": r"$\mid$", "<": r"\textless{}"}
_LATEX |= {">": r"\textgreater{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "%&$#_{}"}


@dataclass(frozen=True)
class Cells:
    """A part of a table as text: heading, cells by line, which lines are the best, footnotes, missing runs."""

    heading: str
    lines: list[list[str]]
    best: list[bool]
    notes: list[str]
    missing: list[str]


def cells(part: pd.DataFrame) -> Cells:
    """The text of every cell of a joined part. Marks become footnotes a, b, ...; missing runs name their command."""
    notes: list[str] = []
    lines, missing = [], []
    for row in part.to_dict("records"):
        for mark in row["marks"]:
            if mark not in notes:
                notes.append(mark)
        letters = ",".join(letter(notes.index(mark)) for mark in row["marks"])
        score = number(row["score"])
        if row["n"] > 1:
            score += f" +- {row['score_sd']:.2f}"
        if not row["n"]:
            score = "missing" if row["missing_seeds"] else ""
        lines.append(
            [
                row["label"] + (f" [{letters}]" if letters else ""),
                score,
                str(row["n"]) if row["command"] else "",
                number(row["paper_score"]),
                number(row["difference"], sign=True),
                *(pair(row[f"{kind}_mb_paper"], row[f"{kind}_mb_actual"]) for kind in ("weight", "feature")),
                pair(row["density_paper"], row["density_actual"]),
                number(row["paper_density"]),
            ]
        )
        if row["missing_seeds"]:
            missing.append(f"{row['label']}: {row['command']}")
    first = part.iloc[0]
    heading = f"{first['part']}: score in {first['unit']}, density in {first['density_unit']}"
    return Cells(heading, lines, part["best"].tolist(), notes, missing)


def markdown(name: str, title: str, parts: Sequence[pd.DataFrame]) -> str:
    """The whole table as GitHub's Markdown."""
    text = [f"## Table {name}. {title}", ""]
    for part in map(cells, parts):
        text += [f"### {part.heading}", "", _md_line(HEADINGS), _md_line(["---", *["---:"] * (len(HEADINGS) - 1)])]
        for line, best in zip(part.lines, part.best, strict=True):
            text.append(_md_line([f"**{line[0]}**", f"**{line[1]}**", *line[2:]] if best else line))
        text.append("")
        text += [f"- [{letter(i)}] {note}" for i, note in enumerate(part.notes)]
        text += [f"- missing: {entry.split(': ', 1)[0]}: `{entry.split(': ', 1)[1]}`" for entry in part.missing]
        text += [""] if part.notes or part.missing else []
    return "\n".join(text)


def latex(name: str, title: str, parts: Sequence[pd.DataFrame]) -> str:
    r"""The whole table for LaTeX with the package booktabs; one `tabular` for all parts."""
    columns = "l" + "r" * (len(HEADINGS) - 1)
    text = [r"\begin{table}", r"\centering", rf"\caption{{{escaped(title)}}}", rf"\label{{tab:{name}}}"]
    text += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _tex_line([escaped(word) for word in HEADINGS])]
    notes: list[str] = []
    for part in map(cells, parts):
        text += [r"\midrule", rf"\multicolumn{{{len(HEADINGS)}}}{{l}}{{\textit{{{escaped(part.heading)}}}}} \\"]
        for line, best in zip(part.lines, part.best, strict=True):
            shown = [escaped(cell) for cell in line]
            text.append(_tex_line([rf"\textbf{{{cell}}}" for cell in shown[:2]] + shown[2:] if best else shown))
        head = part.heading.partition(":")[0]
        notes += [rf"{escaped(f'{head} [{letter(i)}] {note}')}\\" for i, note in enumerate(part.notes)]
    text += [r"\bottomrule", r"\end{tabular}"]
    text += [r"\par\smallskip\footnotesize\raggedright", *notes] if notes else []
    return "\n".join([*text, r"\end{table}", ""])


def csv(parts: Sequence[pd.DataFrame]) -> str:
    """All parts with all columns in full precision; marks and missing seeds joined with `; `."""
    table = pd.concat(parts, ignore_index=True)
    for column in ("marks", "missing_seeds"):
        table[column] = ["; ".join(map(str, values)) for values in table[column]]
    text: str = table.to_csv(index=False, lineterminator="\n")
    return text


def number(value: float, sign: bool = False) -> str:
    """Four significant digits, two decimals at least from 1 on; nothing for a value that is not there."""
    if math.isnan(value):
        return ""
    size = abs(value)
    decimals = 2 if sign or size >= 1 or value == 0 else 4
    return f"{value:{'+' if sign else ''}.{decimals}f}"


def pair(first: float, second: float) -> str:
    """Two numbers side by side."""
    return "" if math.isnan(first) and math.isnan(second) else f"{number(first)} | {number(second) or '-'}"


def letter(index: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    head = letter(index // 26 - 1) if index >= 26 else ""
    return head + "abcdefghijklmnopqrstuvwxyz"[index % 26]


def escaped(text: str) -> str:
    """Text for LaTeX."""
    return re.sub(r"->|\+-|[\\%&$#_{}|<>~^]", lambda match: _LATEX[match.group()], text)


def _md_line(line: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |"


def _tex_line(line: Sequence[str]) -> str:
    return " & ".join(line) + r" \\"
