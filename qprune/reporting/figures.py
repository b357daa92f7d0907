"""Curves and points of runs, drawn from what is stored: rows, metrics and operators. Nothing is trained here."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qprune.compression.plan import INPUT
from qprune.compression.schedule import Timeline
from qprune.reporting.drawing import COLOURS, MARKER_SIZE, MARKERS, PHASES, inside, stacked, title_of, with_unit
from qprune.reporting.front import pareto_front
from qprune.runs.row import Row

KINDS = ("weight", "feature")
MOST_IN_LEGEND = 8  # recipes; with more, only those of the Pareto front are named, by numbers in their points


def training_curve(
    curve: pd.DataFrame, timeline: Timeline | None, row: Row, names: Mapping[str, str] | None = None
) -> Figure:
    """Loss and score over epochs; the phases (pruned, quantized, both) are shaded, float is white."""
    figure, axes = stacked(2, sharex=True)
    for axis in axes:
        _shade(axis, curve, timeline)
    axes[0].plot(curve["epoch"], curve["loss"], color=COLOURS[0], marker=_dots(curve))
    axes[0].set_ylabel("loss (mean of an epoch)")
    if (curve["loss"] > 0).all() and curve["loss"].max() > 10 * curve["loss"].min():
        axes[0].set_yscale("log")
    if row.metric in curve:
        scores = curve[["epoch", row.metric]].dropna()
        axes[1].plot(scores["epoch"], scores[row.metric], color=COLOURS[1], marker=_dots(curve))
    axes[1].set_ylabel(with_unit(row.metric, names))
    axes[1].set_xlabel("epoch")
    axes[0].set_title(title_of(row))
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        axes[0].legend(handles, labels, fontsize=7, loc="upper right")
    return figure


def over_time(
    curve: pd.DataFrame, operators: Sequence[Mapping[str, Any]], timeline: Timeline | None, row: Row
) -> Figure:
    """Zeros and decimal bits over epochs. Dots are measured at ends of epochs, lines step at the schedule's events.

    timeline: of the run, in its own steps; without it only the dots are drawn, and no decimal bits.
    """
    figure, axes = stacked(2, height=1.9, sharex=True)
    for axis in axes:
        _shade(axis, curve, timeline)
    for i, kind in enumerate(KINDS):
        size = (6 - 3 * i) * (1 if _dots(curve) else 0.4)  # the two often coincide
        axes[0].plot(
            curve["epoch"], 100 * curve[f"{kind}_sparsity"], MARKERS[i], color=COLOURS[i], ms=size, label=f"{kind}s"
        )
        if timeline is not None:
            steps = [0, *timeline.prune_steps, row.steps]
            levels = [timeline.fraction(timeline.prune_events(step)) for step in steps]
            zeros = 100 * getattr(row, f"{kind}_sparsity") * np.array(levels)
            axes[0].step(np.array(steps) / timeline.steps_per_epoch, zeros, where="post", color=COLOURS[i], lw=1)
            _decimals_over_time(axes[1], [o for o in operators if o["kind"] == kind], kind, timeline, row.steps)
    axes[0].set(ylabel="zeros (%)", ylim=(-4, 104), title=title_of(row))
    axes[0].legend(fontsize=7, loc="upper left")
    axes[1].set(xlabel="epoch", ylabel="decimal bits d*")
    axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    if axes[1].get_legend_handles_labels()[0]:
        axes[1].legend(fontsize=7, loc="upper left", title="one line per tensor", title_fontsize=7)
    return figure


def _decimals_over_time(
    axis: Axes, operators: Sequence[Mapping[str, Any]], kind: str, timeline: Timeline, steps: int
) -> None:
    """A line per quantizer from its event to the end, at its mean over channels; lines of one height are set apart."""
    event = timeline.weight_step if kind == "weight" else timeline.feature_step
    shown = [o for o in operators if o["operator"] == "quantize"]
    if event is None or not shown:
        return
    colour, place = COLOURS[KINDS.index(kind)], KINDS.index(kind)
    times = (event / timeline.steps_per_epoch, steps / timeline.steps_per_epoch)
    heights = Counter(float(np.mean(operator["decimals"])) for operator in shown)
    label = f"{kind}s, frozen at epoch {times[0]:.4g}"
    for height, lines in heights.items():
        for offset in np.linspace(-0.1, 0.1, lines) if lines > 1 else [0.0]:
            style = "-" if place == 0 else "--"
            axis.plot(times, [height + offset] * 2, color=colour, lw=1, ls=style, label=label)
            axis.plot(times[0], height + offset, MARKERS[place], color=colour, ms=3)
            label = ""


def decimal_bits(operators: Sequence[Mapping[str, Any]], row: Row) -> Figure:
    """Decimal bits d* of every quantizer, frozen at its event: mean over channels, bar from least to largest."""
    figure, [axis] = stacked(1)
    shown = sorted((o for o in operators if o["operator"] == "quantize"), key=lambda o: bool(o["site"] != INPUT))
    for i, kind in enumerate(KINDS):
        places = [place for place, o in enumerate(shown) if o["kind"] == kind]
        values = [np.asarray(shown[place]["decimals"]) for place in places]
        if places:
            means = np.array([v.mean() for v in values])
            spread = np.abs([[v.min() for v in values] - means, [v.max() for v in values] - means])
            axis.errorbar(places, means, yerr=spread, fmt=MARKERS[i], ms=4, color=COLOURS[i], label=f"{kind}s", lw=1)
    step = max(1, len(shown) // 24)
    axis.set_xticks(range(0, len(shown), step), [o["site"] for o in shown[::step]], rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="decimal bits d*", title=title_of(row))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ymargin(0.2)  # room for the legend
    if shown:
        axis.legend(fontsize=7)
    return figure


def density_against_score(
    runs: pd.DataFrame, task: str, metric: str, higher_is_better: bool, unit: str = "", names: Mapping[str, str] = {}
) -> Figure:
    """Density (accounting `actual`) against score with the Pareto front: a point per recipe, bars are deviations.

    runs: columns recipe, order, score, density; one line per run. Many recipes are coloured by their order.
    """
    figure, [axis] = stacked(1, height=3.2)
    points = runs.groupby(["recipe", "order"], sort=True)[["score", "density"]].agg(["mean", "std"]).reset_index()
    scores, densities = points["score", "mean"], points["density", "mean"]
    front = pareto_front(scores.tolist(), densities.tolist(), higher_is_better)
    few, orders = len(points) <= MOST_IN_LEGEND, sorted(runs["order"].unique())
    named: set[str] = set()
    for i, point in points.iterrows():
        recipe, order = str(point["recipe", ""]), str(point["order", ""])
        place, label = (int(str(i)), recipe) if few else (orders.index(order), order.replace("_", " "))
        numbered = not few and i in front
        axis.errorbar(
            point["score", "mean"],
            point["density", "mean"],
            xerr=point["score", "std"] if point["score", "std"] > 0 else None,
            fmt=MARKERS[place % 7],
            color=COLOURS[place % 7],
            ms=MARKER_SIZE if numbered else 6,
            lw=1,
            capsize=2,
            label=None if label in named else label,
            zorder=4 if numbered else 3,
        )
        named.add(label)
        if numbered:
            number, at = front.index(int(str(i))) + 1, (point["score", "mean"], point["density", "mean"])
            inside(axis, at, str(number), MARKERS[place % 7], COLOURS[place % 7], zorder=4)
    axis.plot(scores.iloc[front], densities.iloc[front], color="#888888", lw=1, ls="--", label="Pareto front")
    for number, i in enumerate([] if few else front, 1):
        axis.plot([], [], " ", label=f"{number}  {points['recipe', ''][i]}")
    counts = sorted(runs.groupby(["recipe", "order"]).size().unique())
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    direction = "" if higher_is_better else ", smaller is better"
    axis.set(
        xlabel=with_unit(metric, names) + direction,
        ylabel=f"performance density{f' ({unit})' if unit else ''}",
        title=f"{task}: means over seeds (n = {seeds})",
    )
    axis.margins(0.08)
    axis.legend(fontsize=6, loc="best")
    return figure


def score_by_window(points: pd.DataFrame, metric: str, task: str, names: Mapping[str, str] | None = None) -> Figure:
    """Fig. 4: score against the window T. points: columns window (samples), recipe, score; one line per run."""
    figure, [axis] = stacked(1, height=2.6)
    groups = list(points.groupby("recipe", sort=True))
    for i, (recipe, group) in enumerate(groups):
        runs = group.groupby("window")["score"]
        mean, spread, counts = runs.mean(), runs.std(ddof=1).fillna(0.0), sorted(runs.size().unique())
        seeds = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
        apart = 2.0 ** (0.06 * (i - (len(groups) - 1) / 2))  # so that bars do not hide each other
        axis.errorbar(
            mean.index * apart,
            mean,
            yerr=spread,
            marker=MARKERS[i % 7],
            color=COLOURS[i % 7],
            label=f"{recipe} ({seeds})",
            capsize=3,
        )
    axis.set_xscale("log", base=2)
    windows = sorted(points["window"].unique())
    axis.set_xticks(windows, [str(window) for window in windows])
    axis.minorticks_off()
    title = f"{task}: mean and standard deviation over seeds"
    axis.set(xlabel="window T (samples)", ylabel=with_unit(metric, names), title=title)
    axis.legend(fontsize=7)
    return figure


def _shade(axis: Axes, curve: pd.DataFrame, timeline: Timeline | None) -> None:
    """Colour what was active: from event to event of the timeline, or else by epochs, as it was at their ends."""
    names = {"P": "pruned", "Q": "quantized", "PQ": "pruned and quantized"}
    if timeline is None:
        phases = list(zip(curve["epoch"] - 1, curve["epoch"], curve["phase"], strict=True))
    else:
        marks = (0, *timeline.prune_steps, timeline.weight_step, timeline.feature_step)
        steps = sorted({step for step in marks if step is not None})
        ends = [*steps[1:], curve["step"].max()]
        length = timeline.steps_per_epoch
        phases = [(a / length, b / length, timeline.phase(a)) for a, b in zip(steps, ends, strict=True)]
    kinds = ["".join(letter for letter in "PQ" if letter in str(phase)) for _, _, phase in phases]
    seen: set[str] = set()
    for kind, group in itertools.groupby(zip(kinds, phases, strict=True), key=lambda pair: pair[0]):
        spans = [phase for _, phase in group]
        if kind:  # neighbours of one colour as one span: a seam would show
            label = None if kind in seen else names[kind]
            axis.axvspan(spans[0][0], spans[-1][1], color=PHASES[kind], lw=0, zorder=0, label=label)
            seen.add(kind)
    axis.set_xlim(0, max(curve["epoch"].max(), 1) * 1.01)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _dots(curve: pd.DataFrame) -> str | None:
    return "o" if len(curve) <= 30 else None
