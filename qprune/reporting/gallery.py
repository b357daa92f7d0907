"""Which figures there are: those of one run, and those over the runs that share task, budget, data and metric."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qprune.compression.plan import INPUT
from qprune.compression.schedule import Timeline
from qprune.config.signature import MACHINE_KEYS, later_at_default, without
from qprune.errors import UserError
from qprune.reporting import figures, pictures
from qprune.reporting.drawing import Drawn, drawn
from qprune.runs.folder import HISTOGRAMS_FILE
from qprune.runs.row import Row
from qprune.runs.store import Store

RECIPES_IN_A_PICTURE = 10  # with the task's input and target beside them, two lines of panels
_CURVE = {"epoch", "step", "phase", "loss", "weight_sparsity", "feature_sparsity"}


@dataclass(frozen=True)
class Names:
    """What tables call things. density: unit by task; score: name with unit by metric."""

    density: Mapping[str, str] = field(default_factory=dict)
    score: Mapping[str, str] = field(default_factory=dict)


def of_run(store: Store, row: Row, names: Names) -> Iterator[Drawn]:
    """The figures of one run, from the files beside its row; a file that is not there or not whole has no figure."""
    place = store.folders[row.signature].path
    curve, operators = store.metrics(row.signature), _list(place / "operators.json")
    timeline = timeline_of(store.config(row.signature), row)
    if curve is not None and len(curve) and set(curve) >= _CURVE:
        drawing = figures.training_curve(curve, timeline, row, names.score)
        yield drawn(drawing, f"{place.name}-curve", "Loss and score over epochs")
        if operators:
            drawing = figures.over_time(curve, operators, timeline, row)
            yield drawn(drawing, f"{place.name}-time", "Zeros and decimal bits over epochs")
    if any(operator["operator"] == "quantize" for operator in operators):
        caption = "Decimal bits by tensor, with their range over channels"
        yield drawn(figures.decimal_bits(operators, row), f"{place.name}-decimals", caption)
    if histograms := sorted(_list(place / HISTOGRAMS_FILE), key=lambda entry: bool(entry["site"] != INPUT)):
        caption = "Features on the test set before quantization, and the range of their grids"
        yield drawn(pictures.feature_histograms(histograms, row), f"{place.name}-features", caption)
    if found := _masks(place):
        yield drawn(pictures.masks(found), f"{place.name}-masks", "Feature masks; black is pruned")


def over_runs(store: Store, rows: Sequence[Row], names: Names) -> Iterator[Drawn]:
    """The figures over several runs: density against score, score against window, pictures side by side."""
    for key in sorted({(row.task, row.budget, row.data_source, row.metric) for row in rows}):
        group = [row for row in rows if (row.task, row.budget, row.data_source, row.metric) == key]
        name, told = "-".join(key[:3]), f"{key[0]}, budget {key[1]}, {key[2]} data"
        marked = "; runs with marks" if any(row.marks for row in group) else ""
        labels = recipes(store, group)
        table = pd.DataFrame(
            [(labels[row.signature], row.order, row.score, row.density_actual) for row in group],
            columns=["recipe", "order", "score", "density"],
        )
        if table["recipe"].nunique() > 1:
            better, unit = group[0].higher_is_better, names.density.get(key[0], "")
            drawing = figures.density_against_score(table, key[0], key[3], better, unit, names.score)
            caption = f"{told}{marked}: density (accounting actual) against score, means over seeds"
            yield drawn(drawing, f"{name}-density", caption)
        windows = _windows(store, group)
        if windows["window"].nunique() > 1:
            drawing = figures.score_by_window(windows, key[3], key[0], names.score)
            yield drawn(drawing, f"{name}-window", f"{told}{marked}: score against window T")
        yield from _samples(store, group, labels, name, told)


def recipes(store: Store, rows: Sequence[Row], left_out: Sequence[str] = ()) -> dict[str, str]:
    """What to call each run's recipe: its notation, and the keys that set it apart from others of the same notation.

    Seeds, machine keys and the keys `left_out` set no recipe apart, and a key goes without saying where it has the
    value that most runs have. By signature.
    """
    dropped = frozenset((*MACHINE_KEYS, "seed", "schedule", *left_out))
    flat, names = {}, {}
    for row in rows:
        if (config := store.config(row.signature)) is not None:
            flat[row.signature] = dict(_flat(without(config, dropped.union(later_at_default(config)))))
    for notation in dict.fromkeys(row.notation for row in rows):
        group = [row.signature for row in rows if row.notation == notation]
        configs = [flat[name] for name in group if name in flat]
        keys = dict.fromkeys(key for config in configs for key in config)
        usual = {key: _of_most([repr(config.get(key)) for config in configs]) for key in keys}
        for name in group:
            own = flat.get(name)
            apart = [] if own is None else [f"{k}={own.get(k)}" for k in keys if repr(own.get(k)) != usual[k]]
            names[name] = f"{notation} {'(no config)' if own is None else ', '.join(apart)}".strip()
    return names


def _of_most(values: Sequence[str]) -> str | None:
    """The value that more than half are, or None."""
    value, count = Counter(values).most_common(1)[0]
    return value if 2 * count > len(values) else None


def timeline_of(config: Mapping[str, Any] | None, row: Row) -> Timeline | None:
    """The schedule of a run in its own steps, or None where its config is missing or not this version's."""
    from qprune.config.build import Recipe

    if config is None or row.steps % row.epochs:
        return None
    try:
        return Recipe.from_config(config).schedule.in_steps(row.steps // row.epochs)
    except (UserError, KeyError, TypeError):
        return None


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _windows(store: Store, rows: Sequence[Row]) -> pd.DataFrame:
    """Window, recipe and score of the runs that prune features."""
    pruned = [row for row in rows if row.feature_sparsity]
    labels, points = recipes(store, pruned, left_out=("prune.window",)), []
    for row in pruned:
        config = store.config(row.signature)
        if config is not None:
            points.append((config["prune"]["window"], labels[row.signature], row.score))
    table = pd.DataFrame(points, columns=["window", "recipe", "score"])
    several = table.groupby("recipe")["window"].transform("nunique") > 1
    return table[several]


def _samples(store: Store, rows: Sequence[Row], labels: Mapping[str, str], name: str, told: str) -> Iterator[Drawn]:
    """The pictures that runs keep, side by side: the least seed of each recipe, the float network first.

    Of many recipes, those of most seeds are shown.
    """
    seeds = Counter(labels[row.signature] for row in rows)
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.order != "baseline", row.notation, row.seed)):
        first.setdefault(labels[row.signature], row)
    shown = sorted(first, key=lambda label: (first[label].order != "baseline", -seeds[label]))[:RECIPES_IN_A_PICTURE]
    if len(shown) < len(first):
        told += f" ({len(shown)} of {len(first)} recipes, those of most seeds)"
    first = {label: row for label, row in first.items() if label in shown}
    found: dict[tuple[str, tuple[int, ...]], dict[str, pictures.Pixels]] = {}
    for label, row in first.items():
        for path in sorted((store.folders[row.signature].path / "pictures").glob("*.png")):
            if (pixels := _pixels(path)) is not None:
                found.setdefault((path.stem, pixels.shape), {})[f"{label}\nseed {row.seed}"] = pixels
    for (stem, shape), group in found.items():
        size = f"-{shape[1]}x{shape[0]}" if sum(stem == other for other, _ in found) > 1 else ""
        drawing = pictures.side_by_side(group, f"{told}: {stem}")
        yield drawn(drawing, f"{name}-{stem}{size}", f"{told}: pictures of {stem}, side by side")


def _pixels(path: Path) -> pictures.Pixels | None:
    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            return np.asarray(image.convert("RGB"))
    except OSError:
        return None


def _list(path: Path) -> list[dict[str, Any]]:
    """A list of objects in JSON, or an empty one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    return content if isinstance(content, list) and all(isinstance(entry, dict) for entry in content) else []


def _masks(place: Path, most: int = 4) -> dict[str, pictures.Pixels]:
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
