"""The figure of a search: size against score, the front, and what was asked."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from qprune.experiment.figures import COLOURS, MARKERS, with_unit


def size_against_score(
    table: pd.DataFrame, metric: str, task: str, least: float | None = None, max_size_bits: float | None = None
) -> Figure:
    """Size in Mb (logarithmic) against mean score, bars of one deviation over seeds; filled points are on the front.

    table: of finished models, columns order, bits, sparsity, n, mean, sd, size_mb, front. Colours tell orders, shapes
    sparsities, the number beside a point its bits. least: the score that is needed; max_size_bits: the size allowed.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    done = table[table["n"] > 0]
    orders, sparsities = list(dict.fromkeys(table["order"])), sorted(set(table["sparsity"]))
    for _, row in done.iterrows():
        colour = COLOURS[orders.index(row["order"]) % len(COLOURS)]
        marker = MARKERS[sparsities.index(row["sparsity"]) % len(MARKERS)]
        face = colour if row["front"] == "yes" else "none"
        deviation = None if pd.isna(row["sd"]) else row["sd"]
        axis.errorbar(
            row["size_mb"], row["mean"], yerr=deviation, fmt=marker, color=colour, mfc=face, ms=6, lw=1, capsize=2
        )
        axis.annotate(
            str(row["bits"]), (row["size_mb"], row["mean"]), xytext=(5, 4), textcoords="offset points", fontsize=7
        )
    front = done[done["front"] == "yes"].sort_values("size_mb")
    axis.step(front["size_mb"], front["mean"], where="post", color="#888888", lw=1, ls="--", zorder=0)
    if least is not None:
        axis.axhline(least, color="#000000", lw=0.8, ls=":")
        axis.annotate("needed", (0.01, least), xycoords=("axes fraction", "data"), va="top", fontsize=7)
    if max_size_bits is not None:
        axis.axvline(max_size_bits / 1e6, color="#000000", lw=0.8, ls=":")
    axis.set_xscale("log")
    for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        which(LogFormatter(minor_thresholds=(2, 0.5)))  # numbers rather than powers, and not too many
    axis.set(xlabel="size of weights, features and input (Mb)", ylabel=with_unit(metric), title=task)
    for i, order in enumerate(orders):
        axis.plot([], [], "s", color=COLOURS[i % len(COLOURS)], label=order.replace("_", " "))
    for i, sparsity in enumerate(sparsities):
        axis.plot([], [], MARKERS[i % len(MARKERS)], color="#888888", mfc="none", label=f"{sparsity:.0%} zeros")
    axis.plot([], [], color="#888888", lw=1, ls="--", label="front (filled)")
    axis.legend(fontsize=7, loc="lower right")
    return figure
