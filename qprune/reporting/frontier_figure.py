"""The figure of a search: size and density against score, the front of each, and what was asked."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from qprune.reporting.drawing import COLOURS, MARKERS, WIDTH, plain, with_unit


def fronts(
    table: pd.DataFrame,
    metric: str,
    task: str,
    least: float | None = None,
    max_size_bits: float | None = None,
    whole: bool = True,
) -> Figure:
    """Mean score against size in Mb (logarithmic), and against density; bars are one deviation over seeds.

    table: of models, columns order, bits, sparsity, n, mean, sd, size_mb, density_actual, front, density_front; those
    without a finished run (n = 0) are not drawn. Filled points are on the panel's front. Colours tell orders, shapes
    sparsities, the number beside a point its bits. least: the score that is needed; max_size_bits: the size allowed.
    whole: whether models beyond `least` were looked for too.
    """
    figure = Figure(figsize=(1.5 * WIDTH, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    plain([left, right])
    done = table[table["n"] > 0]
    orders, sparsities = list(dict.fromkeys(table["order"])), sorted(set(table["sparsity"]))
    _points(left, done, "size_mb", "front", orders, sparsities)
    _points(right, done, "density_actual", "density_front", orders, sparsities)
    if least is not None:
        for axis in (left, right):
            axis.axhline(least, color="#000000", lw=0.8, ls=":")
        said = "needed" if whole else "needed; beyond it the front may lack models"
        left.annotate(said, (0.01, least), xycoords=("axes fraction", "data"), va="top", fontsize=7)
    if max_size_bits is not None:
        left.axvline(max_size_bits / 1e6, color="#000000", lw=0.8, ls=":", label="largest size that is allowed")
    left.set_xscale("log")
    for which in (left.xaxis.set_major_formatter, left.xaxis.set_minor_formatter):
        which(LogFormatter(minor_thresholds=(2, 0.5)))  # numbers rather than powers, and not too many
    left.set(xlabel="size of weights, features and input (Mb)", ylabel=with_unit(metric))
    right.set(xlabel="performance density")
    for i, order in enumerate(orders):
        left.plot([], [], "s", color=COLOURS[i % len(COLOURS)], label=order.replace("_", " "))
    for i, sparsity in enumerate(sparsities):
        left.plot([], [], MARKERS[i % len(MARKERS)], color="#888888", mfc="none", label=f"{sparsity:.0%} zeros")
    left.plot([], [], color="#888888", lw=1, ls="--", label="front (filled)")
    seeds = sorted({int(n) for n in done["n"]})
    counts = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    figure.suptitle(f"{task}: bits beside points, means over seeds (n = {counts})", fontsize=11)
    figure.legend(fontsize=7, loc="outside lower center", ncols=6)
    return figure


def _points(axis: Axes, done: pd.DataFrame, x: str, front: str, orders: list[str], sparsities: list[float]) -> None:
    for _, row in done.iterrows():
        colour = COLOURS[orders.index(row["order"]) % len(COLOURS)]
        axis.errorbar(
            row[x],
            row["mean"],
            yerr=None if pd.isna(row["sd"]) else row["sd"],
            fmt=MARKERS[sparsities.index(row["sparsity"]) % len(MARKERS)],
            color=colour,
            mfc=colour if row[front] == "yes" else "none",
            ms=6,
            lw=1,
            capsize=2,
        )
        axis.annotate(str(row["bits"]), (row[x], row["mean"]), xytext=(5, 4), textcoords="offset points", fontsize=7)
    line = done[done[front] == "yes"].sort_values(x)
    axis.plot(line[x], line["mean"], color="#888888", lw=1, ls="--", zorder=0)
