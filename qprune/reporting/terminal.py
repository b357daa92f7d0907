"""Tables of the paper's values beside ours, as a terminal shows them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

from qprune.reporting.table_text import letter, number
from qprune.reporting.tables import Table
from qprune.training.progress import plain

_COLUMNS = ("score", "n", "paper", "diff", "Mb", "density", "paper")


def print_table(console: Console, table: Table, parts: Sequence[pd.DataFrame]) -> None:
    """Print a table: sizes as stored, densities as the paper counts; rows without a run have no score."""
    console.print(plain(f"Table {table.name}. {table.title}"), style="bold")
    for part in parts:
        rows = part.to_dict("records")
        notes = list(dict.fromkeys(mark for row in rows for mark in row["marks"]))
        title = plain("{part}: {unit}".format_map(rows[0]))
        grid = Grid(Column(title), box=None, pad_edge=False, header_style="dim")
        for heading in _COLUMNS:
            grid.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            letters = ",".join(letter(notes.index(mark)) for mark in row["marks"])
            style = "bold" if row["best"] else "" if row["n"] or not row["command"] else "dim"
            cells = [f"{row['label']}{f' [{letters}]' if letters else ''}", *_cells(row)]
            grid.add_row(*map(plain, cells), style=style)
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


def _cells(row: Mapping[Any, Any]) -> list[str]:
    spread = f" ± {row['score_sd']:.2f}" if row["n"] > 1 else ""
    own = "actual" if row["n"] else "paper"  # other methods have the paper's sizes alone
    size = row[f"weight_mb_{own}"] + row[f"feature_mb_{own}"]
    return [
        f"{number(row['score'])}{spread}",
        str(row["n"]) if row["n"] else "",
        row["printed_score"],
        number(row["difference"], sign=True),
        "" if math.isnan(size) else f"{size:.1f}",
        number(row["density_paper"]),
        row["printed_density"],
    ]
