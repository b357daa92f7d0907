"""Figures of runs and of sets of runs, drawn from what is stored: rows, curves and tensors. Nothing is trained here."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qprune.experiment.files import write_atomically
from qprune.experiment.results import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito: for all eyes
PHASES = {"P": "#fbe3d0", "Q": "#d6e8f5", "PQ": "#e6dcef", "": "#ffffff"}
MARKERS = "osD^vPX"


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG (150 dots per inch) and SVG (text as text); `path` has no suffix. The files' paths."""
    written = []
    for suffix, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
        path_there = path.with_name(f"{path.name}.{suffix}")
        write_atomically(path_there, _drawn(figure, suffix, options))
        written.append(path_there)
    return written


def svg(figure: Figure) -> str:
    """The figure as an SVG element, for a page."""
    text = _drawn(figure, "svg", {"metadata": {"Date": None}}).decode()
    return text[text.index("<svg") :]


def training_curve(curve: pd.DataFrame, row: Row) -> Figure:
    """Loss and score over epochs; the phases (float, pruning, quantized) are shaded."""
    figure, axes = _figure(2, sharex=True)
    for axis in axes:
        _shade(axis, curve)
    axes[0].plot(curve["epoch"], curve["loss"], color=COLOURS[0], marker=_dots(curve))
    axes[0].set_ylabel("loss (mean of an epoch)")
    if row.metric in curve:
        scores = curve[["epoch", row.metric]].dropna()
        axes[1].plot(scores["epoch"], scores[row.metric], color=COLOURS[1], marker=_dots(curve))
    axes[1].set_ylabel(with_unit(row.metric))
    axes[1].set_xlabel("epoch")
    axes[0].set_title(title_of(row))
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        axes[0].legend(handles, labels, fontsize=7, loc="upper right")
    return figure


def sparsity_curve(curve: pd.DataFrame, row: Row) -> Figure:
    """Fraction of zeros in weights and features over epochs."""
    figure, [axis] = _figure(1)
    _shade(axis, curve)
    for i, kind in enumerate(("weight", "feature")):
        values = 100 * curve[f"{kind}_sparsity"]
        style = "-" if kind == "weight" else "--"  # the two often coincide
        axis.step(curve["epoch"], values, style, where="pre", color=COLOURS[i], label=f"{kind}s", marker=_dots(curve))
    axis.set(xlabel="epoch", ylabel="zeros (%)", ylim=(-2, 102), title=title_of(row))
    axis.legend(fontsize=7)
    return figure


def decimal_bits(operators: Sequence[Mapping[str, Any]], row: Row) -> Figure:
    """Decimal bits d* of every quantizer, frozen at its event: mean over channels, bar from least to largest."""
    figure, [axis] = _figure(1)
    shown = [o for o in operators if o["operator"] == "quantize"]
    for i, kind in enumerate(("weight", "feature")):
        places = [place for place, o in enumerate(shown) if o["kind"] == kind]
        values = [np.asarray(shown[place]["decimals"]) for place in places]
        if places:
            means = np.array([v.mean() for v in values])
            spread = np.abs([[v.min() for v in values] - means, [v.max() for v in values] - means])
            axis.errorbar(places, means, yerr=spread, fmt=MARKERS[i], ms=4, color=COLOURS[i], label=f"{kind}s", lw=1)
    step = max(1, len(shown) // 24)
    axis.set_xticks(range(0, len(shown), step), [o["site"] for o in shown[::step]], rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="decimal bits d*", title=title_of(row))
    if shown:
        axis.legend(fontsize=7)
    return figure


def density_against_score(rows: Sequence[Row], unit: str = "") -> Figure:
    """Density (accounting `actual`) against score, one point per recipe (mean over seeds), with the Pareto front."""
    figure, [axis] = _figure(1)
    table = pd.DataFrame(
        [(r.notation, r.score, r.density_actual) for r in rows], columns=["recipe", "score", "density"]
    )
    points = table.groupby("recipe", sort=True).mean()
    for i, (recipe, point) in enumerate(points.iterrows()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        axis.scatter(point["score"], point["density"], color=colour, marker=marker, label=str(recipe), zorder=3, s=40)
    front = pareto_front(points["score"].tolist(), points["density"].tolist(), rows[0].higher_is_better)
    axis.plot(
        points["score"].iloc[front], points["density"].iloc[front], color="#888888", lw=1, ls="--", label="Pareto front"
    )
    axis.set(
        xlabel=with_unit(rows[0].metric),
        ylabel=f"performance density{f' ({unit})' if unit else ''}",
        title=rows[0].task,
    )
    axis.legend(fontsize=6, loc="best")
    return figure


def pareto_front(scores: Sequence[float], densities: Sequence[float], higher_is_better: bool) -> list[int]:
    """Places of the points that no other one beats in score and density, sorted by score."""
    sign = 1 if higher_is_better else -1
    order = sorted(range(len(scores)), key=lambda i: (-sign * scores[i], -densities[i]))
    front, best = [], -np.inf
    for i in order:
        if densities[i] > best:
            front.append(i)
            best = densities[i]
    return sorted(front, key=lambda i: scores[i])


def score_by_window(points: pd.DataFrame, metric: str, task: str) -> Figure:
    """Fig. 4: score against the window T. points: columns window (samples), recipe, score; one row per run."""
    figure, [axis] = _figure(1)
    for i, (recipe, group) in enumerate(points.groupby("recipe", sort=True)):
        runs = group.groupby("window")["score"]
        mean, spread = runs.mean(), runs.std(ddof=1).fillna(0.0)
        axis.errorbar(
            mean.index, mean, yerr=spread, marker=MARKERS[i % 7], color=COLOURS[i % 7], label=str(recipe), capsize=3
        )
    axis.set_xscale("log", base=2)
    windows = sorted(points["window"].unique())
    axis.set_xticks(windows, [str(window) for window in windows])
    axis.set(xlabel="window T (samples)", ylabel=with_unit(metric), title=f"{task}: mean and deviation over seeds")
    axis.legend(fontsize=7)
    return figure


def histogram(values: np.ndarray[Any, Any], name: str, bits: int, decimal: int) -> Figure:
    """Fig. 2: values of a tensor on a logarithmic count, with the range that its grid of `bits` bits can hold."""
    figure, [axis] = _figure(1)
    axis.hist(values.ravel(), bins=120, log=True, color=COLOURS[0])
    low, high = -(2 ** (bits - 1)) * 2.0**-decimal, (2 ** (bits - 1) - 1) * 2.0**-decimal
    axis.axvspan(low, high, color=PHASES["Q"], zorder=0, label=f"range of {bits} bits, d* = {decimal}")
    axis.set(xlabel="value", ylabel="elements", title=name)
    axis.legend(fontsize=7)
    return figure


def masks(features: Mapping[str, np.ndarray[Any, Any]], channels: int = 16) -> Figure:
    """Feature masks (C, H, W) as pictures, the first `channels` of each; dark is pruned."""
    names = list(features)
    figure = Figure(figsize=(6.4, 1.9 * len(names) + 0.3), layout="constrained")
    grid = figure.subplots(len(names), 1, squeeze=False)
    for axis, name in zip(grid[:, 0], names, strict=True):
        mask = features[name][:channels].astype(float)
        tiles = list(np.pad(mask, ((0, 0), (1, 1), (1, 1)), constant_values=0.5))
        half = (len(tiles) + 1) // 2
        tiles += [np.ones_like(tiles[0])] * (2 * half - len(tiles))
        lines = [np.concatenate(tiles[start : start + half], axis=1) for start in (0, half)]
        axis.imshow(np.concatenate(lines), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"{name}: channels 0 to {len(mask) - 1}, {1 - features[name].mean():.1%} pruned", fontsize=8)
        axis.axis("off")
    return figure


def side_by_side(pictures: Mapping[str, np.ndarray[Any, Any]]) -> Figure:
    """Pictures (H, W) or (H, W, 3) with values in [0, 1] beside each other, each under its recipe."""
    figure = Figure(figsize=(2.4 * len(pictures), 2.8), layout="constrained")
    for axis, (name, picture) in zip(
        figure.subplots(1, len(pictures), squeeze=False)[0], pictures.items(), strict=True
    ):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1)
        axis.set_title(name, fontsize=8)
        axis.axis("off")
    return figure


def with_unit(metric: str) -> str:
    """A metric's name with its unit in brackets: `psnr_db` is PSNR (dB)."""
    name, _, unit = metric.rpartition("_")
    units = {"db": "dB", "percent": "%"}
    return f"{name.replace('_', ' ')} ({units[unit]})" if unit in units else metric.replace("_", " ")


def title_of(row: Row) -> str:
    """Task, recipe, seed; and that the row carries marks, if it does."""
    return f"{row.task}  {row.notation}  seed {row.seed}" + ("  (marked)" if row.marks else "")


def _figure(rows: int, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.4, 2.2 * rows + 1.2), layout="constrained")
    axes = list(figure.subplots(rows, 1, squeeze=False, sharex=sharex)[:, 0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _shade(axis: Axes, curve: pd.DataFrame) -> None:
    """Colour the epochs by what was active at their end."""
    kinds = ["".join(letter for letter in "PQ" if letter in str(phase)) for phase in curve["phase"]]
    names = {"P": "pruning", "Q": "quantized", "PQ": "pruned and quantized"}
    seen: set[str] = set()
    for epoch, kind in zip(curve["epoch"], kinds, strict=True):
        if kind:
            label = None if kind in seen else names[kind]
            axis.axvspan(epoch - 1, epoch, color=PHASES[kind], lw=0, zorder=0, label=label)
            seen.add(kind)
    axis.set_xlim(0, max(curve["epoch"].max(), 1) * 1.01)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dots(curve: pd.DataFrame) -> str | None:
    return "o" if len(curve) <= 30 else None


def _drawn(figure: Figure, suffix: str, options: Mapping[str, Any]) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "qprune", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=suffix, **options)
    return buffer.getvalue()
