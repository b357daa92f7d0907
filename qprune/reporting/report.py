"""One self-contained HTML page about the stored runs: tables, figures, configs and environments; no network needed."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from qprune.reporting import gallery, rendering
from qprune.reporting.comparison import compare_orders, too_few_text
from qprune.reporting.drawing import Drawn
from qprune.reporting.gallery import Names
from qprune.runs.row import Row
from qprune.runs.store import Store

RUNS_DRAWN = 20  # runs whose figures are in the page, a seed of every recipe before the others
_FILES = ("config.yaml", "environment.json")
_FILES_OF_DRAWN = ("plan.csv", "metrics.csv")
_RUN_HEADINGS = ("recipe", "task", "seed", "score", "weights Mb", "features Mb", "density", "budget", "data", "marks")


@dataclass(frozen=True)
class Picture:
    """A picture in the page: `data` is a data URL."""

    data: str
    caption: str


@dataclass(frozen=True)
class Run:
    """A run in the page."""

    row: Row
    name: str
    figures: list[Picture]
    files: dict[str, str]


@dataclass(frozen=True)
class Shown:
    """A joined table in the page."""

    name: str
    title: str
    parts: list[rendering.Cells]


def page(
    store: Store,
    tables: Sequence[Shown],
    names: Names | None = None,
    figure_folder: Path | None = None,
    runs_drawn: int = RUNS_DRAWN,
) -> str:
    """The page. Every figure is also written to `figure_folder` as PNG and SVG."""
    names = names or Names()
    comparisons = compare_orders(store)
    store.check(list(store.rows))
    rows = sorted(store.rows.values(), key=lambda row: (row.task, row.budget, row.data_source, row.notation, row.seed))
    chosen = {row.signature for row in _first(store, rows, runs_drawn)}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("qprune.reporting") / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title="Pruning and quantization, in either order",
        rows=rows,
        marked=sum(bool(row.marks) for row in rows),
        comparisons=comparisons,
        too_few_text=too_few_text,
        tables=tables,
        headings=rendering.HEADINGS,
        letter=rendering.letter,
        figures=[_picture(figure, figure_folder) for figure in gallery.over_runs(store, rows, names)],
        run_headings=_RUN_HEADINGS,
        run_lines=[_line(row) for row in rows],
        links=[f"run-{row.signature[:10]}" for row in rows],
        runs=[_run(store, row, names, figure_folder, row.signature in chosen) for row in rows],
        left=len(rows) - len(chosen),
        problems=store.problems,
    )


def _first(store: Store, rows: Sequence[Row], most: int) -> list[Row]:
    """`most` of the rows: the first seed of every recipe, the recipes of most seeds before others; then second ones."""
    labels = gallery.recipes(store, rows)
    seeds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        seeds.setdefault((row.task, row.budget, row.data_source, labels[row.signature]), []).append(row)
    ranked = [(place, -len(group), row) for group in seeds.values() for place, row in enumerate(group)]
    return [row for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:most]]


def _line(row: Row) -> list[str]:
    sizes = [f"{row.weight_bits_actual / 1e6:.4g}", f"{row.feature_bits_actual / 1e6:.4g}", f"{row.density_actual:.4g}"]
    head = [row.notation, row.task, str(row.seed), f"{row.score:.4g} {row.metric}"]
    return [*head, *sizes, row.budget, row.data_source, "; ".join(row.marks)]


def _run(store: Store, row: Row, names: Names, folder: Path | None, with_figures: bool) -> Run:
    place = store.folders[row.signature].path
    shown = [_picture(figure, folder) for figure in gallery.of_run(store, row, names)] if with_figures else []
    texts = {}
    for name in (*_FILES, *(_FILES_OF_DRAWN if with_figures else ())):
        if (place / name).exists():
            texts[name] = (place / name).read_text(encoding="utf-8", errors="replace")
    return Run(row, place.name, shown, texts)


def _picture(figure: Drawn, folder: Path | None) -> Picture:
    if folder is not None:
        figure.save(folder)
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}", figure.caption)
