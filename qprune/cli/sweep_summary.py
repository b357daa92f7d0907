"""The table at the end of a sweep: means over seeds of its finished runs."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from qprune.atomic_write import csv_bytes, write_atomically
from qprune.config.signature import short_hash
from qprune.runs.jobs import Job
from qprune.runs.row_text import digits, score_text
from qprune.training.progress import plain, print_text


def print_summary(jobs: Sequence[Job]) -> None:
    """Print the finished runs of a sweep, summarized over seeds; the table is stored too."""
    table = _summary(jobs)
    name = short_hash(str(job.folder.name) for job in jobs)
    path = Path(jobs[0].config.results_dir) / "sweeps" / f"sweep-{name}.csv"
    write_atomically(path, csv_bytes(table))
    grid = Table(box=None, pad_edge=False)
    for heading in ("overrides", "recipe"):
        grid.add_column(heading, overflow="fold")
    for heading in ("score", "n", *(["missing"] if table["missing"].any() else []), "w+f Mb", "density"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        counts = [str(row["n"]), *([str(row["missing"])] if table["missing"].any() else [])]
        cells = ["-", *counts, "-", "-"]
        if row["n"]:
            spread = f" ± {row['sd']:.2f}" if row["n"] > 1 else ""
            cells[0] = score_text(row["metric"], row["mean"], name=False) + spread
            cells[-2:] = [digits(row["weight_mb"] + row["feature_mb"]), digits(row["density"])]
        grid.add_row(plain(row["overrides"]), plain(row["recipe"]), *cells)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(grid)
    print_text(f"summary: {path}")


def _summary(jobs: Sequence[Job]) -> pd.DataFrame:
    """Return mean, deviation and n per combination of values but the seed's."""
    same = set.intersection(*(set(job.overrides) for job in jobs))
    versions = {job.row.arithmetic for job in jobs if job.row}
    lines: list[dict[str, Any]] = []
    for job in jobs:
        own = [text for text in job.overrides if text not in same and not text.startswith("seed=")]
        own += [f"[arithmetic {job.row.arithmetic}]"] if job.row and len(versions) > 1 else []
        lines.append({"overrides": " ".join(own) or "all"} | (vars(job.row) if job.row else {}))
    numbers = ["score", "weight_bits_actual", "feature_bits_actual", "density_actual"]
    runs = pd.DataFrame(lines, columns=["overrides", "notation", "metric", *numbers, "marks"], dtype=object)
    found = (
        runs.astype(dict.fromkeys(numbers, "float64"))
        .groupby("overrides", sort=False, as_index=False)
        .agg(
            recipe=("notation", "first"),
            metric=("metric", "first"),
            mean=("score", "mean"),
            sd=("score", "std"),
            n=("score", "count"),
            missing=("score", lambda scores: scores.isna().sum()),
            weight_mb=("weight_bits_actual", lambda bits: bits.mean() / 1e6),
            feature_mb=("feature_bits_actual", lambda bits: bits.mean() / 1e6),
            density=("density_actual", "mean"),
            marks=("marks", lambda lists: "; ".join(dict.fromkeys(itertools.chain.from_iterable(lists.dropna())))),
        )
    )
    return found.fillna({"recipe": "", "metric": ""})
