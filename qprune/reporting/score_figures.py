"""Figures of many runs: scores against density, window or size."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from qprune.errors import visible
from qprune.reporting.plotting import COLOURS, MARKERS, TIP, WIDTH, axes_of, plotted, with_unit
from qprune.runs.scores import pareto_front

DARK = ("#0072b2", "#000000")  # of COLOURS: on these, letters are white
MARKER_SIZE = 9.0  # points, of markers with text inside
MOST_IN_LEGEND = 8  # recipes; with more, only those of the Pareto front are named, by numbers in their points


def density_against_score(
    runs: pd.DataFrame, task: str, metric: str, higher_is_better: bool, unit: str = "", names: Mapping[str, str] = {}
) -> Figure:
    """Draw density (accounting `actual`) against score with the Pareto front.

    runs: columns recipe, order, score, density; one line per run. A point is the mean of a recipe, its bar the
    standard deviation. Many recipes are coloured by their order. unit: of density.
    """
    figure, [axis] = axes_of(1, height=4.4)
    points = runs.groupby(["recipe", "order"], sort=True)[["score", "density"]].agg(["mean", "std"]).reset_index()
    scores, densities = points["score", "mean"], points["density", "mean"]
    front = pareto_front(scores.tolist(), densities.tolist(), higher_is_better)
    few, orders = len(points) <= MOST_IN_LEGEND, sorted(runs["order"].unique())
    named: set[str] = set()
    for i, (recipe, order, score, spread, density, _) in enumerate(points.itertuples(index=False, name=None)):
        place, label = (i, plotted(recipe)) if few else (orders.index(order), order.replace("_", " "))
        style = (MARKERS[place % 7], COLOURS[place % 7], COLOURS[place % 7])
        rank = "" if few or i not in front else str(front.index(i) + 1)
        bar: dict[str, Any] = {"xerr": spread if spread > 0 else None, "label": None if label in named else label}
        bar["gid"] = f"{TIP}{visible(recipe)}: {_mean(score, spread)} at density {density:.3g}"
        _point(axis, (score, density), style, rank, 4 if rank else 3, **bar)
        named.add(label)
    axis.plot(scores.iloc[front], densities.iloc[front], color="#888888", lw=1, ls="--", label="Pareto front")
    for number, i in enumerate([] if few else front, 1):
        axis.plot([], [], " ", label=plotted(f"{number}  {points['recipe', ''][i]}"))
    axis.set(
        xlabel=plotted(with_unit(metric, names)) + ("" if higher_is_better else ", smaller is better"),
        ylabel=plotted(f"performance density{f' ({unit})' if unit else ''}"),
        title=f"{task}: means over seeds ({_counts(runs.groupby(['recipe', 'order']).size())})",
    )
    axis.margins(0.08)
    axis.legend(fontsize=8, loc="best")
    return figure


def score_by_window(points: pd.DataFrame, metric: str, task: str, names: Mapping[str, str] = {}) -> Figure:
    """Draw score against T (Fig. 4). points: columns window, recipe, score."""
    figure, [axis] = axes_of(1, height=3.8)
    groups = list(points.groupby("recipe", sort=True))
    for i, (recipe, group) in enumerate(groups):
        runs = group.groupby("window")["score"]
        mean, spread = runs.mean(), runs.std(ddof=1).fillna(0.0)
        apart = 2.0 ** (0.06 * (i - (len(groups) - 1) / 2))  # so that bars do not hide each other
        label, marker, colour = plotted(f"{recipe} ({_counts(runs.size())})"), MARKERS[i % 7], COLOURS[i % 7]
        axis.errorbar(mean.index * apart, mean, spread, marker=marker, color=colour, label=label, capsize=3)
        for window in mean.index:
            tip = f"{TIP}{visible(recipe)}, T = {window}: {_mean(mean[window], spread[window])}"
            axis.plot(window * apart, mean[window], marker, color=colour, gid=tip)
    axis.set_xscale("log", base=2)
    windows = sorted(points["window"].unique())
    axis.set_xticks(windows, [str(window) for window in windows])
    axis.minorticks_off()
    title = f"{task}: mean and standard deviation over seeds"
    axis.set(xlabel="window T (samples)", ylabel=plotted(with_unit(metric, names)), title=title)
    axis.legend(fontsize=7)
    return figure


def search_fronts(table: pd.DataFrame, metric: str, title: str, limits: Mapping[str, float], complete: bool) -> Figure:
    """Draw the scores of a search against size and density, with both fronts.

    Filled points are on the panel's front. Colours stand for orders, shapes for sparsities, numbers for bits.

    table: of `qprune frontier`; models without a finished run are not drawn. limits: the `score` that is needed and the
    `size_mb` that is allowed, if any. complete: whether models that miss the score were searched too.
    """
    figure, [left, right] = axes_of(1, 2, 1.5 * WIDTH, 5.0, sharey=True)
    done = table[table["n"] > 0]
    colours = dict(zip(dict.fromkeys(table["order"]), itertools.cycle(COLOURS)))
    markers = dict(zip(sorted(set(table["sparsity"])), itertools.cycle(MARKERS)))
    for axis, x, front in ((left, "size_mb", "front"), (right, "density_actual", "density_front")):
        layered = done.sort_values(front, key=lambda column: column == "yes", kind="stable")
        for zorder, row in enumerate(layered.to_dict("records"), 3):
            colour = colours[row["order"]]
            style = (markers[row["sparsity"]], colour, colour if row[front] == "yes" else "#ffffff")
            spread = None if pd.isna(row["sd"]) else row["sd"]
            _point(axis, (row[x], row["mean"]), style, str(row["bits"]), zorder, yerr=spread)
        line = done[done[front] == "yes"].sort_values(x)
        axis.plot(line[x], line["mean"], color="#888888", lw=1, ls="--", zorder=0)
    if "score" in limits:
        label = "score that is needed" + ("" if complete else "; beyond it the front may lack models")
        left.axhline(limits["score"], color="#000000", lw=0.8, ls=":", label=label)
        right.axhline(limits["score"], color="#000000", lw=0.8, ls=":")
    if "size_mb" in limits:
        left.axvline(limits["size_mb"], color="#000000", lw=0.8, ls="-.", label="largest size that is allowed")
    left.set_xscale("log")
    for set_formatter in (left.xaxis.set_major_formatter, left.xaxis.set_minor_formatter):
        set_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # numbers rather than powers, and not too many
    left.set(xlabel="size of weights, features and input (Mb)", ylabel=plotted(with_unit(metric)))
    right.set(xlabel="performance density")
    for order, colour in colours.items():
        left.plot([], [], "s", color=colour, label=order.replace("_", " "))
    for sparsity, marker in markers.items():
        left.plot([], [], marker, color="#888888", mfc="none", label=f"{sparsity:.0%} zeros")
    left.plot([], [], color="#888888", lw=1, ls="--", label="front (filled)")
    figure.suptitle(f"{title}: bits in points, means over seeds ({_counts(done['n'])})", fontsize=11)
    figure.legend(fontsize=7, loc="outside lower center", ncols=6)
    return figure


def _mean(score: float, spread: float) -> str:
    return f"{score:.2f}" + (f" ± {spread:.2f}" if spread > 0 else "")


def _counts(seeds: Iterable[int]) -> str:
    numbers = sorted({*seeds})
    return f"n = {numbers[0]}" + (f" to {numbers[-1]}" if len(numbers) > 1 else "")


def _point(
    axis: Axes, at: tuple[float, float], style: tuple[str, str, str], text: str, zorder: int, **options: Any
) -> None:
    """Draw a point with error bars, and up to two letters inside the marker.

    style: marker, its colour, and the colour that it is filled with. options: of matplotlib's `errorbar`.
    """
    marker, colour, face = style
    size = MARKER_SIZE if text else 6
    axis.errorbar(*at, fmt=marker, color=colour, mfc=face, ms=size, lw=1, capsize=2, zorder=zorder, **options)
    if text:
        down = {"^": -1.2, "v": 1.2}.get(marker, 0.0)  # points, to where a triangle is wide
        look: dict[str, Any] = {"fontsize": 5.5, "color": "#ffffff" if face in DARK else "#000000"}
        look |= {"ha": "center", "va": "center_baseline", "xytext": (0, down), "textcoords": "offset points"}
        axis.annotate(text, at, zorder=zorder + 0.5, **look)  # errorbar draws its markers a bit above its own zorder
