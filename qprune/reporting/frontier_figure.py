"""The figure of a search: size and density against score, the front of each, and what was asked."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from qprune.reporting.drawing import COLOURS, MARKER_SIZE, MARKERS, WIDTH, inside, plain, with_unit


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
    sparsities, the number in a point its bits. least: the score that is needed; max_size_bits: the size allowed.
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
        said = "score that is needed" + ("" if whole else "; beyond it the front may lack models")
        left.axhline(least, color="#000000", lw=0.8, ls=":", label=said)
        right.axhline(least, color="#000000", lw=0.8, ls=":")
    if max_size_bits is not None:
        left.axvline(max_size_bits / 1e6, color="#000000", lw=0.8, ls="-.", label="largest size that is allowed")
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
    figure.suptitle(f"{task}: bits in points, means over seeds (n = {counts})", fontsize=11)
    figure.legend(fontsize=7, loc="outside lower center", ncols=6)
    return figure


def _points(axis: Axes, done: pd.DataFrame, x: str, front: str, orders: list[str], sparsities: list[float]) -> None:
    """The models, each with its bits inside; those on the front lie above others."""
    layered = done.sort_values(front, key=lambda column: column == "yes", kind="stable")
    for layer, (_, row) in enumerate(layered.iterrows(), 3):
        colour = COLOURS[orders.index(row["order"]) % len(COLOURS)]
        marker = MARKERS[sparsities.index(row["sparsity"]) % len(MARKERS)]
        face = colour if row[front] == "yes" else "#ffffff"
        axis.errorbar(
            row[x],
            row["mean"],
            yerr=None if pd.isna(row["sd"]) else row["sd"],
            fmt=marker,
            color=colour,
            mfc=face,
            ms=MARKER_SIZE,
            lw=1,
            capsize=2,
            zorder=layer,
        )
        inside(axis, (row[x], row["mean"]), str(row["bits"]), marker, face, layer)
    line = done[done[front] == "yes"].sort_values(x)
    axis.plot(line[x], line["mean"], color="#888888", lw=1, ls="--", zorder=0)
