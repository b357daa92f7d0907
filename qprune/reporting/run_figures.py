"""Figures of one run: its curves, its fraction bits, its features and their masks."""

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
from qprune.reporting.plotting import (
    BETWEEN_TIPS,
    COLOURS,
    MARKERS,
    TIP,
    WIDTH,
    Pixels,
    axes_of,
    plotted,
    title_of,
    with_unit,
)
from qprune.runs.row import Row

KINDS = ("weight", "feature")
PHASES = {"P": "#fbe3d0", "Q": "#d6e8f5", "PQ": "#e6dcef"}
SITES = 9  # features whose histograms are shown, evenly chosen from a network's

Entry = Mapping[str, Any]  # of operators.json or histograms.json


def training_curve(curve: pd.DataFrame, timeline: Timeline | None, row: Row, names: Mapping[str, str] = {}) -> Figure:
    """Draw loss and score over epochs, with shaded phases (float is white)."""
    figure, axes = axes_of(2, height=5.6, sharex=True)
    for axis in axes:
        _shade(axis, curve, timeline)
    _curve(axes[0], curve, "loss", COLOURS[0])
    axes[0].set_ylabel("loss (mean of an epoch)")
    if (curve["loss"] > 0).all() and curve["loss"].max() > 10 * curve["loss"].min():
        axes[0].set_yscale("log")
    if row.metric in curve:
        _curve(axes[1], curve, row.metric, COLOURS[1])
    axes[1].set(xlabel="epoch", ylabel=plotted(with_unit(row.metric, names)))
    axes[0].set_title(title_of(row))
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=7, loc="upper right")
    return figure


def over_time(curve: pd.DataFrame, operators: Sequence[Entry], timeline: Timeline | None, row: Row) -> Figure:
    """Draw zeros and fraction bits over epochs: measured dots, planned lines.

    timeline: of the run, in its own steps; without it only the dots are drawn, and no fraction bits.
    """
    figure, axes = axes_of(2, height=5.0, sharex=True)
    for axis in axes:
        _shade(axis, curve, timeline)
    for i, kind in enumerate(KINDS):
        size = (6 - 3 * i) * (1 if _dots(curve) else 0.4)  # the two often coincide
        zeros = 100 * curve[f"{kind}_sparsity"]
        axes[0].plot(curve["epoch"], zeros, MARKERS[i], color=COLOURS[i], ms=size, label=f"{kind}s")
        if timeline is not None:
            steps = [0, *timeline.prune_steps, row.steps]
            levels = np.array([float(timeline.fraction(timeline.prune_events(step))) for step in steps])
            levels = 100 * getattr(row, f"{kind}_sparsity") * levels
            axes[0].step(np.array(steps) / timeline.steps_per_epoch, levels, where="post", color=COLOURS[i], lw=1)
            quantizers = [o for o in operators if o["kind"] == kind and o["operator"] == "quantize"]
            _fraction_bits_over_time(axes[1], quantizers, i, timeline, row.steps)
    axes[0].set(ylabel="zeros (%)", ylim=(-4, 104), title=title_of(row))
    axes[0].legend(fontsize=7, loc="upper left")
    axes[1].set(xlabel="epoch", ylabel="fraction bits d*")
    axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    if axes[1].get_legend_handles_labels()[0]:
        axes[1].legend(fontsize=7, loc="upper left", title="one line per tensor", title_fontsize=7)
    return figure


def _fraction_bits_over_time(
    axis: Axes, quantizers: Sequence[Entry], place: int, timeline: Timeline, steps: int
) -> None:
    """Draw the mean d* of quantizers of KINDS[place]; equal ones are set apart."""
    event = (timeline.weight_step, timeline.feature_step)[place]
    if event is None or not quantizers:
        return
    times = (event / timeline.steps_per_epoch, steps / timeline.steps_per_epoch)
    label, style = f"{KINDS[place]}s, frozen at epoch {times[0]:.4g}", ("-", "--")[place]
    for height, lines in Counter(float(np.mean(operator["decimals"])) for operator in quantizers).items():
        for offset in np.linspace(-0.1, 0.1, lines) if lines > 1 else [0.0]:
            axis.plot(times, [height + offset] * 2, color=COLOURS[place], lw=1, ls=style, label=label)
            axis.plot(times[0], height + offset, MARKERS[place], color=COLOURS[place], ms=3)
            label = ""


def fraction_bits(operators: Sequence[Entry], row: Row) -> Figure:
    """Draw d* of every quantizer: mean over channels, and range as a bar."""
    figure, [axis] = axes_of(1)
    shown = sorted((o for o in operators if o["operator"] == "quantize"), key=lambda o: bool(o["site"] != INPUT))
    for i, kind in enumerate(KINDS):
        places = [place for place, o in enumerate(shown) if o["kind"] == kind]
        values = [np.asarray(shown[place]["decimals"]) for place in places]
        if places:
            means = np.array([v.mean() for v in values])
            spread = np.abs([[v.min() for v in values] - means, [v.max() for v in values] - means])
            axis.errorbar(places, means, yerr=spread, fmt=MARKERS[i], ms=4, color=COLOURS[i], label=f"{kind}s", lw=1)
    step = max(1, len(shown) // 24)
    sites = [plotted(o["site"]) for o in shown[::step]]
    axis.set_xticks(range(0, len(shown), step), sites, rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="fraction bits d*", title=title_of(row))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ymargin(0.2)  # room for the legend
    if shown:
        axis.legend(fontsize=7)
    return figure


def feature_histograms(sites: Sequence[Entry], row: Row) -> Figure:
    """Draw histograms of features (Fig. 2), with the range of their grids shaded.

    sites: as histograms.json has them. What lies outside the range is clipped.
    """
    chosen = [sites[i] for i in sorted({round(i) for i in np.linspace(0, len(sites) - 1, min(SITES, len(sites)))})]
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure, grid = axes_of(lines, columns, WIDTH if columns > 1 else WIDTH / 1.6, 1.9 * lines + 0.7)
    for axis in grid[len(chosen) :]:
        axis.set_visible(False)
    for i, (axis, site) in enumerate(zip(grid, chosen, strict=False)):
        edges = site["start"] + site["width"] * np.arange(len(site["counts"]) + 1)
        counts = np.array(site["counts"])
        axis.axvspan(site["low"], site["high"], color=PHASES["Q"], lw=0, zorder=0, label="range of the grid")
        axis.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=COLOURS[0], label="values")
        axis.set(yscale="log", ylim=(0.5, 2 * counts.max()))
        outside = (site["below"] + site["above"]) / site["elements"]
        bits = f"{site['bits']} bits, d* = {site['decimal']}, {outside:.2%} outside"
        axis.set_title(f"{plotted(site['site'])}\n{bits}", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.set_ylabel("" if i % columns else "elements", fontsize=7)
        axis.set_xlabel("value", fontsize=7)
    figure.legend(*grid[0].get_legend_handles_labels(), fontsize=7, ncols=2, loc="outside lower center")
    more = f" ({len(chosen)} of {len(sites)} features)" if len(chosen) < len(sites) else ""
    figure.suptitle(title_of(row) + more, fontsize=9)
    return figure


def feature_tails(runs: Mapping[str, Sequence[Entry]]) -> Figure:
    """Draw how far features reach (Fig. 2): values in units of their feature's root mean square, all features alike.

    runs: histograms.json by `title_of` a run.
    """
    figure, axes = axes_of(-(-len(runs) // 2), 2, WIDTH, 1.6 * len(runs), sharex=True, sharey=True)
    axes[-1].set_visible(len(runs) % 2 == 0)
    for place, (axis, (label, sites)) in enumerate(zip(axes, runs.items(), strict=False)):
        values, shares = [], []
        for site in sites:
            counts = np.array(site["counts"])
            centres = site["start"] + site["width"] * (np.arange(len(counts)) + 0.5)
            values.append(centres / np.sqrt((counts * centres**2).sum() / counts.sum()))
            shares.append(counts / counts.sum() / len(sites))
        far = float(np.ceil(max(np.abs(v[c > 0]).max() for v, c in zip(values, shares, strict=True))))
        shown = np.histogram(np.concatenate(values), np.arange(-far, far + 1), weights=np.concatenate(shares))
        axis.stairs(*shown, fill=True, color=COLOURS[place % 7])
        title = "\n".join([*label.split("  "), f"up to {far:.0f}"])
        axis.set(yscale="log", xlabel="value / root mean square", title=title)
        axis.title.set_fontsize(7)
    axes[0].set_ylabel("share of values")
    return figure


def feature_masks(features: Mapping[str, Pixels], channels: int = 16) -> Figure:
    """Draw the first channels of feature masks (C, H, W); black is pruned."""
    figure, axes = axes_of(len(features), height=1.9 * len(features) + 0.3)
    for axis, (name, whole) in zip(axes, features.items(), strict=True):
        mask = whole[:channels].astype(float)
        tiles = list(np.pad(mask, ((0, 0), (1, 1), (1, 1)), constant_values=0.5))
        half = (len(tiles) + 1) // 2
        tiles += [np.ones_like(tiles[0])] * (2 * half - len(tiles))
        lines = [np.concatenate(tiles[start : start + half], axis=1) for start in (0, half)]
        axis.imshow(np.concatenate(lines), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        pruned = f"{1 - whole.mean():.1%} of {' x '.join(map(str, whole.shape))} neurons pruned"
        axis.set_title(f"{plotted(name)}: {pruned}; channels 0 to {len(mask) - 1}", fontsize=8)
        axis.axis("off")
    return figure


def _shade(axis: Axes, curve: pd.DataFrame, timeline: Timeline | None) -> None:
    """Colour active phases: by events of the timeline, or else by epochs."""
    if timeline is None:
        phases = list(zip(curve["epoch"] - 1, curve["epoch"], curve["phase"], strict=True))
    else:
        events = (0, *timeline.prune_steps, timeline.weight_step, timeline.feature_step)
        steps = sorted({step for step in events if step is not None})
        ends, length = [*steps[1:], curve["step"].max()], timeline.steps_per_epoch
        phases = [(a / length, b / length, timeline.phase(a)) for a, b in zip(steps, ends, strict=True)]
    names = {"P": "pruned", "Q": "quantized", "PQ": "pruned and quantized"}
    for kind, group in itertools.groupby(phases, key=lambda phase: "".join(c for c in "PQ" if c in str(phase[2]))):
        spans = list(group)
        if kind:  # neighbours of one colour as one span: a seam would show
            axis.axvspan(spans[0][0], spans[-1][1], color=PHASES[kind], lw=0, zorder=0, label=names.pop(kind, None))
    axis.set_xlim(0, max(curve["epoch"].max(), 1) * 1.01)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curve(axis: Axes, curve: pd.DataFrame, column: str, colour: str) -> None:
    """Draw a column over epochs; each point has a tip, also where it has no dot."""
    points = curve.loc[np.isfinite(curve[column]), ["epoch", column]]
    tips = BETWEEN_TIPS.join(f"epoch {epoch:g}: {value:.4g}" for epoch, value in points.itertuples(index=False))
    look: dict[str, Any] = {} if _dots(curve) else {"mfc": (0, 0, 0, 0), "mec": (0, 0, 0, 0)}  # for the pointer alone
    axis.plot(points["epoch"], points[column], color=colour, marker="o", gid=TIP + tips, **look)


def _dots(curve: pd.DataFrame) -> str | None:
    return "o" if len(curve) <= 30 else None
