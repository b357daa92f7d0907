"""One self-contained HTML page about the stored runs; no network needed."""

import base64
import gzip
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load

from qprune.compression.plan import INPUT
from qprune.errors import UserError, counted, visible
from qprune.reporting import figures, table_text
from qprune.reporting.comparison import METHOD, ORDER, compare_orders, too_few_text
from qprune.reporting.figures import Pixels
from qprune.reporting.recipes import recipes
from qprune.reporting.tables import Joined
from qprune.runs import folder as run_files
from qprune.runs.folder import RunFolder
from qprune.runs.row import Row
from qprune.runs.row_text import digits, score_text
from qprune.runs.store import Store
from qprune.runs.stored import HISTOGRAMS, OPERATORS

MOST_PIXELS, HIGHEST = 1 << 25, 100  # of a picture that is drawn; the latter in its width
RECIPES_IN_A_PICTURE = 10  # with the task's input and target beside them, two lines of panels
_CURVE = {"epoch", "step", "phase", "loss", "weight_sparsity", "feature_sparsity"}
_FILES = (run_files.CONFIG_FILE, run_files.ENVIRONMENT_FILE)
_FILES_OF_DRAWN = (run_files.PLAN_FILE, run_files.METRICS_FILE)
_PER_BOP = "density per effective BOP"
_HEADINGS = ("run", "task", "recipe", "seed", "score", "size Mb", "density", _PER_BOP, "budget", "data", "notes")
_FILTERS = ("task", "budget", "data")
_SUMMARY_HEADINGS = ("model", "recipe", "score", "size Mb", "smaller", "density")
_LOSS = 0.01  # of the float network's score, that the smallest model may lose
Picture = tuple[str, str, Figure]  # name of the files, caption, figure


def page(
    store: Store, joined: Sequence[Joined], figure_folder: Path, runs_drawn: int, note: Callable[[str], None]
) -> str:
    """Write the page and its figures; what is wrong goes to the store's problems.

    runs_drawn: runs whose own figures are in the page, a
    seed of every recipe before the others. note: called with the caption of each figure that is drawn.
    """
    comparisons = compare_orders(store)
    store.check(list(store.rows))
    for read in (RunFolder.check_all, RunFolder.config):
        store.leave_out_bad(read)
    labels: dict[str, str] = {}
    for _, group in itertools.groupby(sorted(store.rows.values(), key=_conditions), key=_conditions):
        labels |= recipes(store, list(group))
    rows = sorted(
        store.rows.values(),
        key=lambda row: (*_conditions(row), row.notation, _natural(labels[row.signature]), row.seed),
    )
    chosen = {row.signature for row in _first(rows, labels, runs_drawn)}
    lines = [_cells(row, labels) for row in rows]
    headings = [name for name in _HEADINGS if name != _PER_BOP or any(line[name] for line in lines)]

    summary = list(summaries(rows, lambda group: recipes(store, group)))
    drawn = _saved(figures_of_runs(store, rows), figure_folder, note)
    opening = next((each for each in drawn if summary and each["name"] == f"{summary[0]['name']}-density"), None)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    details = {}
    for row in rows:
        is_drawn = row.signature in chosen
        details[row.signature[:10]] = {
            "name": f"{row.task}/{visible(store.folders[row.signature].path.name)}",
            "figures": _saved(figures_of_run(store, row), figure_folder, note) if is_drawn else [],
            "files": _files(store, row, (*_FILES, *(_FILES_OF_DRAWN if is_drawn else ()))),
        }
    template = environment.from_string((files("qprune.reporting") / "report.html").read_text(encoding="utf-8"))
    return template.render(
        title="Pruning and quantization, in either order",
        noted=sum(bool(row.marks) for row in rows),
        summary=summary,
        opening=opening,
        comparisons=comparisons,
        decided=[each for each in comparisons if each.can_decide],
        of_orders=[each for each in comparisons if each.can_decide and each.contrast == ORDER],
        too_few_text=too_few_text,
        method=METHOD,
        tables=[{"table": each.table, "layout": table_text.layout(each.parts)} for each in joined],
        letter=table_text.letter,
        figures=[each for each in drawn if each is not opening],
        run_headings=headings,
        runs=[{"key": line["run"], "cells": [line[name] for name in headings]} for line in lines],
        filters={name: sorted({line[name] for line in lines}) for name in _FILTERS},
        details=_packed(details),
        left=len(rows) - len(chosen),
        problems=store.problems,
    )


def _saved(pictures: Iterator[Picture], folder: Path, note: Callable[[str], None]) -> list[dict[str, str]]:
    """Write figures into `folder`, and return what the page shows of each: an SVG, or a bitmap where it has pixels."""
    found = []
    for name, caption, figure in pictures:
        note(f"{caption}: {name}")
        svg = figures.save(figure, folder, name)
        inline = "" if b"<image" in svg else _element(svg, caption)
        data = "" if inline else _webp(folder / f"{name}.png")
        found.append({"data": data, "svg": inline, "caption": caption, "name": name})
    return found


def _files(store: Store, row: Row, names: Sequence[str]) -> dict[str, str]:
    """Return the text of files of a run; a broken one is a problem of the store."""
    texts = {}
    for name in names:
        if (content := store.stored(row.signature, partial(RunFolder.checked_content, name=name))) is not None:
            texts[name] = content.decode(errors="replace")
    return texts


def _conditions(row: Row) -> tuple[str, str, str]:
    return row.task, row.budget, row.data_source


def _natural(text: str) -> list[str]:
    """Return a key for sorting in which numbers count as numbers: T = 8 before T = 16."""
    return [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def _cells(row: Row, labels: Mapping[str, str]) -> dict[str, str]:
    """Return a row's cells by heading."""
    score, size = score_text(row.metric, row.score, name=False), digits(row.size_bits() / 1e6)
    per_bop = "" if row.density_effective_bops is None else digits(row.density_effective_bops)
    recipe = [row.signature[:10], row.task, labels[row.signature], str(row.seed)]
    numbers = [score, size, digits(row.density_actual), per_bop]
    return dict(zip(_HEADINGS, [*recipe, *numbers, row.budget, row.data_source, "; ".join(row.marks)], strict=True))


def _webp(path: Path) -> str:
    """Return a picture as the address of a small copy within the page."""
    content = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(content, format="WEBP", quality=80, method=4)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _element(svg: bytes, label: str) -> Markup:
    """Return a figure as an element of the page; the tips of its groups are shown where the pointer rests."""
    root = ElementTree.fromstring(svg)
    for metadata in root.findall("{*}metadata"):
        root.remove(metadata)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML needs no namespaces
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.items()}
        if (name := element.get("id", "")).startswith(figures.TIP):
            tips = name.removeprefix(figures.TIP).split(figures.BETWEEN_TIPS)
            for place, text in zip(element.findall(".//{*}use") if tips[1:] else [element], tips, strict=True):
                ElementTree.SubElement(place, "title").text = text
            del element.attrib["id"]
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _packed(value: Any) -> str:
    """Return JSON, compressed and in base 64."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), mtime=0)).decode()


def summaries(rows: Sequence[Row], recipes: Callable[[Sequence[Row]], Mapping[str, str]]) -> Iterator[dict[str, Any]]:
    """Summarize each task by its most runs of one budget, data and arithmetic, preferably with a float network.

    recipes: names the recipe of each run, by signature.
    """
    groups: dict[str, dict[tuple[str, str, str, int], list[Row]]] = {}
    for row in rows:
        key = (row.budget, row.data_source, row.metric, row.arithmetic)
        groups.setdefault(row.task, {}).setdefault(key, []).append(row)
    for group in sorted((min(found.values(), key=_rank) for found in groups.values()), key=_rank):
        row, lines = group[0], list(_lines(group, recipes(group)))
        name = f"{row.task}-{row.budget}-{row.data_source}"
        what = f"budget {row.budget}, {row.data_source} data, arithmetic version {row.arithmetic}"
        heading = f"{row.task}, {what}: score is {figures.with_unit(row.metric)}"
        yield {"heading": heading, "headings": _SUMMARY_HEADINGS, "lines": lines, "name": name}


def _rank(group: Sequence[Row]) -> tuple[bool, bool, int]:
    return bool(group[0].marks), all(row.notation != "Baseline" for row in group), -len(group)


def _lines(group: Sequence[Row], recipes: Mapping[str, str]) -> Iterator[list[str]]:
    cells = [(recipes[row.signature], row.score, row.size_bits() / 1e6, row.density_actual) for row in group]
    runs = pd.DataFrame(cells, columns=["recipe", "score", "size", "density"])
    how = {"score": ["mean", "std", "count"], "size": "mean", "density": "mean"}
    models = runs.groupby("recipe", sort=False).agg(how).set_axis(["score", "sd", "n", "size", "density"], axis=1)
    sign = 1 if group[0].higher_is_better else -1
    floats, packed = models[models.index == "Baseline"], models[models.index != "Baseline"]
    whole = floats.iloc[0] if len(floats) else None
    chosen = {} if whole is None else {"float network": whole}
    if len(packed):
        chosen["best score"] = packed.sort_values("score", ascending=sign < 0).iloc[0]
        chosen["densest"] = packed.sort_values("density").iloc[-1]
    if whole is not None:
        good = packed[sign * (packed["score"] - whole["score"]) >= -_LOSS * abs(whole["score"])]
        if len(good):
            chosen[f"smallest that loses at most {_LOSS:.0%}"] = good.sort_values("size").iloc[0]
    for name, model in chosen.items():
        spread = f" ± {model['sd']:.2f}" if model["n"] > 1 else ""
        score = f"{model['score']:.2f}{spread}, n = {model['n']:.0f}"
        ratio = "" if whole is None or model is whole else f"{digits(whole['size'] / model['size'], 2)} times"
        yield [name, str(model.name), score, digits(model["size"]), ratio, digits(model["density"])]


def figures_of_run(store: Store, row: Row) -> Iterator[Picture]:
    """Draw the figures of one run; a missing file has no figure, a broken one is a problem of the store."""
    place, timeline = store.folders[row.signature].path, store.timeline(row.signature)
    curve, operators = store.stored(row.signature, RunFolder.metrics), store.stored(row.signature, _operators) or []
    if curve is not None and len(curve) and set(curve) >= _CURVE:
        drawing = figures.training_curve(curve, timeline, row)
        yield f"{place.name}-curve", "Loss and score over epochs", drawing
        if operators:
            drawing = figures.over_time(curve, operators, timeline, row)
            yield f"{place.name}-time", "Zeros and fraction bits over epochs", drawing
    if any(operator["operator"] == "quantize" for operator in operators):
        caption = "Fraction bits by tensor, with their range over channels"
        yield f"{place.name}-decimals", caption, figures.fraction_bits(operators, row)
    if histograms := sorted(store.stored(row.signature, _histograms) or [], key=lambda entry: entry["site"] != INPUT):
        caption = "Features on the test set before quantization, and the range of their grids"
        yield f"{place.name}-features", caption, figures.feature_histograms(histograms, row)
    if found := store.stored(row.signature, _masks):
        yield f"{place.name}-masks", "Feature masks; black is pruned", figures.feature_masks(found)


def figures_of_runs(store: Store, rows: Sequence[Row]) -> Iterator[Picture]:
    """Draw the figures over runs of one task, budget, data and metric; recipes stand in the order of the rows."""
    for key in sorted({(row.task, row.budget, row.data_source, row.metric) for row in rows}):
        group = [row for row in rows if (row.task, row.budget, row.data_source, row.metric) == key]
        name, head = "-".join(key[:3]), f"{key[0]}, budget {key[1]}, {key[2]} data"
        marked = sum(bool(row.marks) for row in group)
        marked_text = f"; {marked} of {counted(len(group), 'run')} not comparable with the paper" if marked else ""
        labels = recipes(store, group)
        if len(set(labels.values())) > 1:
            points = [(labels[row.signature], row.order, row.score, row.density_actual) for row in group]
            table = pd.DataFrame(points, columns=["recipe", "order", "score", "density"])
            better, unit = group[0].higher_is_better, max(row.density_unit for row in group)  # old rows lack it
            drawing = figures.density_against_score(table, key[0], key[3], better, unit)
            caption = f"{head}{marked_text}: density (sizes as stored) against score, means over seeds"
            yield f"{name}-density", caption, drawing
        windows = scores_by_window(store, group)
        if windows["window"].nunique() > 1:
            drawing = figures.score_by_window(windows, key[3], key[0])
            yield f"{name}-window", f"{head}{marked_text}: score against window T", drawing
        yield from _samples(store, group, labels, name, head)
    for conditions in sorted({(row.budget, row.data_source) for row in rows}):
        runs: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(rows, key=lambda row: (row.task, row.order != "quantize_only", row.notation, row.seed)):
            sites = store.stored(row.signature, _histograms)
            is_first = not any(label.startswith(row.task) for label in runs)
            if sites and is_first and (row.budget, row.data_source) == conditions:
                runs[figures.title_of(row)] = sites
        if len(runs) > 1:
            budget, data = conditions
            caption = f"budget {budget}, {data} data: features of the tasks on their test sets, before quantization"
            yield f"{budget}-{data}-tails", caption, figures.feature_tails(runs)


def scores_by_window(store: Store, rows: Sequence[Row]) -> pd.DataFrame:
    """Return window, recipe and score of runs with feature masks."""
    pruned = [row for row in rows if row.feature_sparsity]
    labels, points = recipes(store, pruned, ignored=("prune.window",)), []
    for row in pruned:
        if (config := store.stored(row.signature, RunFolder.config)) is not None:
            points.append((config["prune"]["window"], labels[row.signature], row.score))
    table = pd.DataFrame(points, columns=["window", "recipe", "score"])
    return table[table.groupby("recipe")["window"].transform("nunique") > 1]


def _samples(store: Store, rows: Sequence[Row], labels: Mapping[str, str], name: str, head: str) -> Iterator[Picture]:
    """Draw pictures side by side: the least seed of the recipes with most seeds."""
    seeds = Counter(labels[row.signature] for row in rows)
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.order != "baseline"):
        first.setdefault(labels[row.signature], row)
    shown = sorted(first, key=lambda label: (first[label].order != "baseline", -seeds[label]))[:RECIPES_IN_A_PICTURE]
    if len(shown) < len(first):
        head += f" ({len(shown)} of {len(first)} recipes, those of most seeds)"
    found: dict[tuple[str, tuple[int, ...]], dict[str, Pixels]] = {}
    for label, row in [entry for entry in first.items() if entry[0] in shown]:
        for path in sorted((store.folders[row.signature].path / run_files.PICTURES).glob("*.png")):
            if (pixels := store.stored(row.signature, partial(_picture, name=path.name))) is not None:
                title = f"{label}, seed {row.seed}".replace(", ", "\n")
                found.setdefault((path.stem, pixels.shape), {})[title] = pixels
    for (stem, shape), group in found.items():
        size = f"-{shape[1]}x{shape[0]}" if sum(stem == other for other, _ in found) > 1 else ""
        drawing = figures.side_by_side(group, f"{head}: {stem}")
        yield f"{name}-{stem}{size}", f"{head}: pictures of {stem}, side by side", drawing


def _first(rows: Sequence[Row], labels: Mapping[str, str], most: int) -> list[Row]:
    """Choose `most` rows: first seeds, of recipes with most seeds, then others."""
    seeds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        seeds.setdefault((*_conditions(row), labels[row.signature]), []).append(row)
    ranked = [(place, -len(group), row) for group in seeds.values() for place, row in enumerate(group)]
    return [row for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:most]]


def _operators(run: RunFolder) -> list[dict[str, Any]]:
    return [operator.model_dump() for operator in run.parsed(run_files.OPERATORS_FILE, OPERATORS) or []]


def _histograms(run: RunFolder) -> list[dict[str, Any]]:
    return [histogram.model_dump() for histogram in run.parsed(run_files.HISTOGRAMS_FILE, HISTOGRAMS) or []]


def _picture(run: RunFolder, name: str) -> Pixels | None:
    """Read a picture (H, W, 3) of a run. Raises UserError."""
    content, path = run.checked_content(f"{run_files.PICTURES}/{name}"), run.path / run_files.PICTURES / name
    try:
        with Image.open(io.BytesIO(content or b""), formats=("PNG",)) as image:
            if image.width * image.height > MOST_PIXELS or image.height > HIGHEST * image.width:
                raise UserError(f"it is {image.width}x{image.height}")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow reports damage in many ways, depending on the format
        raise UserError(f"{path} cannot be drawn ({error})") from error


def _masks(run: RunFolder, most: int = 4) -> dict[str, Pixels]:
    """Read the first feature masks (C, H, W) of a run, by module. Raises UserError."""
    if (content := run.checked_content(run_files.NETWORK_FILE)) is None:
        return {}
    try:
        tensors = load(content)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that numpy does not have
        raise UserError(f"{run.path / run_files.NETWORK_FILE} cannot be read ({error})") from error
    ending = "output_operators.pruner.mask"
    masks = {name.removesuffix(ending).rstrip("."): mask for name, mask in tensors.items() if name.endswith(ending)}
    flat = [(name or "input", mask) for name, mask in masks.items() if mask.ndim == 3 and mask.shape[-1] > 1]
    for name, mask in flat:
        if not mask.size or not np.isin(mask, (0, 1)).all():
            raise UserError(f"{run.path / run_files.NETWORK_FILE}: the mask of {name} holds other values than 0 and 1")
    return dict(flat[:most])
