"""One self-contained HTML page about the stored runs: tables, figures, configs and environments; no network needed."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qprune.experiment import figures, rendering
from qprune.experiment.comparison import compare_orders
from qprune.experiment.results import Row
from qprune.experiment.store import Store

RUNS_SHOWN = 40  # runs whose figures and files are in the page
_FILES = ("config.yaml", "environment.json", "plan.csv", "metrics.csv")
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
    store: Store, tables: Sequence[Shown], units: Mapping[str, str] | None = None, figure_folder: Path | None = None
) -> str:
    """The page. units: of density, by task. Every figure is also written to `figure_folder` as PNG and SVG."""
    units = units or {}
    comparisons = compare_orders(store)
    store.check(list(store.rows))
    rows = sorted(store.rows.values(), key=lambda row: (row.task, row.budget, row.data_source, row.notation, row.seed))
    shown = rows[:RUNS_SHOWN]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("qprune.experiment") / "report.html").read_text(encoding="utf-8"))
    runs = [_run(store, row, figure_folder) for row in shown]
    return template.render(
        title="Pruning and quantization, in either order",
        rows=rows,
        marked=sum(bool(row.marks) for row in rows),
        comparisons=comparisons,
        tables=tables,
        headings=rendering.HEADINGS,
        letter=rendering.letter,
        figures=_overviews(store, rows, units, figure_folder),
        run_headings=_RUN_HEADINGS,
        run_lines=[_line(row) for row in rows],
        links=[f"run-{row.signature[:10]}" if i < len(shown) else "" for i, row in enumerate(rows)],
        runs=runs,
        left=len(rows) - len(shown),
        problems=store.problems,
    )


def _line(row: Row) -> list[str]:
    sizes = [f"{row.weight_bits_actual / 1e6:.4g}", f"{row.feature_bits_actual / 1e6:.4g}", f"{row.density_actual:.4g}"]
    head = [row.notation, row.task, str(row.seed), f"{row.score:.4g} {row.metric}"]
    return [*head, *sizes, row.budget, row.data_source, "; ".join(row.marks)]


def _run(store: Store, row: Row, folder: Path | None) -> Run:
    place = store.paths[row.signature].parent
    pictures = []
    curve = store.metrics(row.signature)
    if curve is not None and {"epoch", "phase", "loss", "weight_sparsity", "feature_sparsity"} <= set(curve):
        pictures.append(_picture(figures.training_curve(curve, row), "Loss and score", place.name, "curve", folder))
        if row.weight_sparsity or row.feature_sparsity:
            pictures.append(_picture(figures.sparsity_curve(curve, row), "Zeros", place.name, "sparsity", folder))
    operators = _operators(place)
    if any(operator["operator"] == "quantize" for operator in operators):
        caption = "Decimal bits by tensor, with their range over channels"
        pictures.append(_picture(figures.decimal_bits(operators, row), caption, place.name, "decimals", folder))
    if masks := _masks(place):
        pictures.append(_picture(figures.masks(masks), "Feature masks; black is pruned", place.name, "masks", folder))
    texts = {}
    for name in _FILES:
        if (place / name).exists():
            texts[name] = (place / name).read_text(encoding="utf-8", errors="replace")
    return Run(row, place.name, pictures, texts)


def _overviews(store: Store, rows: Sequence[Row], units: Mapping[str, str], folder: Path | None) -> list[Picture]:
    """Figures over several runs: density against score, score against window, pictures side by side."""
    found = []
    keys = sorted({(row.task, row.budget, row.data_source, row.metric) for row in rows})
    for key in keys:
        group = [row for row in rows if (row.task, row.budget, row.data_source, row.metric) == key]
        name, told = "-".join(key[:3]), f"{key[0]}, budget {key[1]}, {key[2]} data"
        if len({row.notation for row in group}) > 1:
            caption = f"{told}: density (accounting actual) against score, means over seeds"
            found.append(
                _picture(figures.density_against_score(group, units.get(key[0], "")), caption, name, "density", folder)
            )
        windows = _windows(store, group)
        if len(windows["window"].unique()) > 1:
            drawn = figures.score_by_window(windows, key[3], key[0])
            found.append(_picture(drawn, f"{told}: score against window T", name, "window", folder))
        found += _samples(store, group, told)
    return found


def _windows(store: Store, rows: Sequence[Row]) -> pd.DataFrame:
    points = []
    for row in rows:
        config = store.config(row.signature)
        if config is not None and row.feature_sparsity:
            points.append((config["prune"]["window"], row.notation, row.score))
    return pd.DataFrame(points, columns=["window", "recipe", "score"])


def _samples(store: Store, rows: Sequence[Row], told: str) -> list[Picture]:
    """The pictures that runs keep beside their rows, of the first seed of each recipe."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row.notation, row)
    return [
        Picture(_data_url(path.read_bytes(), "png"), f"{told}, {row.notation}: {path.stem}")
        for row in first.values()
        for path in sorted((store.paths[row.signature].parent / "pictures").glob("*.png"))[:4]
    ]


def _operators(place: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads((place / "operators.json").read_bytes())
    except (OSError, ValueError):
        return []
    return content if isinstance(content, list) else []


def _masks(place: Path, most: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    """The first feature masks (C, H, W) of a run, by module."""
    try:
        tensors = load_file(place / "network.safetensors")
    except (OSError, SafetensorError):
        return {}
    ending = "output_operators.pruner.mask"
    found = {
        name.removesuffix(ending).rstrip(".") or "input": value
        for name, value in tensors.items()
        if name.endswith(ending) and value.ndim == 3 and value.shape[-1] > 1
    }
    return dict(list(found.items())[:most])


def _picture(drawn: Figure, caption: str, owner: str, kind: str, folder: Path | None) -> Picture:
    if folder is not None:
        figures.save(drawn, folder / f"{owner}-{kind}")
    return Picture(_data_url(figures.svg(drawn).encode(), "svg+xml"), caption)


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
