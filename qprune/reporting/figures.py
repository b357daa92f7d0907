"""Figures drawn from stored files: of a run, of many runs, and of their pictures."""

import io
import itertools
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

from qprune.atomic_write import write_atomically
from qprune.compression.plan import INPUT
from qprune.compression.schedule import Timeline
from qprune.errors import visible
from qprune.runs.row import Row
from qprune.runs.scores import pareto_front, unit_of_score

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito: for all eyes
DARK = ("#0072b2", "#000000")  # of COLOURS: on these, letters are white
PHASES = {"P": "#fbe3d0", "Q": "#d6e8f5", "PQ": "#e6dcef"}
MARKERS = "osD^vPX"
MARKER_SIZE = 9.0  # points, of markers with text inside
WIDTH = 6.4  # inches
KINDS = ("weight", "feature")
LONGEST = 200  # letters of a label
MOST_IN_LEGEND = 8  # recipes; with more, only those of the Pareto front are named, by numbers in their points
SITES = 9  # features whose histograms are shown, evenly chosen from a network's
PANELS_IN_A_LINE = 6
SMALL = 7  # points, of titles over pictures
TIP = "tip: "  # begins the id of a group in the SVG; the rest is shown where the pointer rests on it
BETWEEN_TIPS = " | "  # separates the tips of a line's points
_WORDS = {"psnr": "PSNR", "ssim": "SSIM", "fid": "FID", "map": "mAP", "top1": "top-1 accuracy"}  # of metrics

Pixels = npt.NDArray[Any]
Entry = Mapping[str, Any]  # of operators.json or histograms.json


def plotted(text: object) -> str:
    """Write text from outside for a plot: no mathematics, no long line, and no `_` in front, which hides a label."""
    shown = visible(text)
    shown = (shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}...").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def save(figure: Figure, folder: Path, name: str) -> bytes:
    """Write NAME.svg, with text, and NAME.png at 150 dpi; return the SVG.

    The same figure gives the same bytes.
    """
    svg, png = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings(), rc_context({"svg.hashsalt": "qprune", "svg.fonttype": "none"}):
        warnings.filterwarnings("ignore", "Glyph|constrained_layout")  # letters that a font lacks; very long names
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")  # laid out by now; once more would cost as much as drawing it
        figure.savefig(png, format="png", dpi=150)
    write_atomically(folder / f"{name}.svg", svg.getvalue())
    write_atomically(folder / f"{name}.png", png.getvalue())
    return svg.getvalue()


def axes_of(
    lines: int, columns: int = 1, width: float = WIDTH, height: float = 3.4, **options: Any
) -> tuple[Figure, list[Axes]]:
    """Make a figure (in inches) with axes in lines and columns, without frames."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, **options).flatten())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def with_unit(metric: str) -> str:
    """Name a metric with its unit: `psnr_db` is PSNR (dB)."""
    unit = unit_of_score(metric)
    words = [_WORDS.get(word, word) for word in (metric.rpartition("_")[0] if unit else metric).split("_")]
    return " ".join(words) + (f" ({unit})" if unit else "")


def tip(*texts: str) -> str:
    """Return the id in the SVG of a line or point whose points show these texts under the pointer."""
    return TIP + BETWEEN_TIPS.join(map(visible, texts))


def title_of(row: Row) -> str:
    """Name task, recipe and seed of a row, and say so if it carries marks."""
    marked = "  (not comparable with the paper)" if row.marks else ""
    return plotted(f"{row.task}  {row.notation}  seed {row.seed}{marked}")


def training_curve(curve: pd.DataFrame, timeline: Timeline | None, row: Row) -> Figure:
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
    axes[1].set(xlabel="epoch", ylabel=plotted(with_unit(row.metric)))
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
    tips = tip(*(f"epoch {epoch:g}: {value:.4g}" for epoch, value in points.itertuples(index=False)))
    look: dict[str, Any] = {} if _dots(curve) else {"mfc": (0, 0, 0, 0), "mec": (0, 0, 0, 0)}  # for the pointer alone
    axis.plot(points["epoch"], points[column], color=colour, marker="o", gid=tips, **look)


def _dots(curve: pd.DataFrame) -> str | None:
    return "o" if len(curve) <= 30 else None


def density_against_score(runs: pd.DataFrame, task: str, metric: str, higher_is_better: bool, unit: str = "") -> Figure:
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
        style = (*_marker(place), COLOURS[place % 7])
        rank = "" if few or i not in front else str(front.index(i) + 1)
        bar: dict[str, Any] = {"xerr": spread if spread > 0 else None, "label": None if label in named else label}
        bar["gid"] = tip(f"{recipe}: {_mean(score, spread)} at density {density:.3g}")
        _point(axis, (score, density), style, rank, 4 if rank else 3, **bar)
        named.add(label)
    axis.plot(scores.iloc[front], densities.iloc[front], color="#888888", lw=1, ls="--", label="Pareto front")
    for number, i in enumerate([] if few else front, 1):
        axis.plot([], [], " ", label=plotted(f"{number}  {points['recipe', ''][i]}"))
    axis.set(
        xlabel=plotted(with_unit(metric)) + ("" if higher_is_better else ", smaller is better"),
        ylabel=plotted(f"performance density{f' ({unit})' if unit else ''}"),
        title=f"{task}: means over seeds ({_counts(runs.groupby(['recipe', 'order']).size())})",
    )
    axis.margins(0.08)
    if few:
        axis.legend(fontsize=8, loc="best")
    else:
        figure.legend(fontsize=7, loc="outside lower center", ncols=4)
    return figure


def _marker(place: int) -> tuple[str, str]:
    """Return marker and colour of a series; the first 49 differ."""
    return MARKERS[(place + place // 7) % 7], COLOURS[place % 7]


def score_by_window(points: pd.DataFrame, metric: str, task: str) -> Figure:
    """Draw score against T (Fig. 4). points: columns window, recipe, score."""
    figure, [axis] = axes_of(1, height=3.8)
    groups = list(points.groupby("recipe", sort=True))
    for i, (recipe, group) in enumerate(groups):
        runs = group.groupby("window")["score"]
        mean, spread = runs.mean(), runs.std(ddof=1).fillna(0.0)
        apart = 2.0 ** (0.06 * (i - (len(groups) - 1) / 2))  # so that bars do not hide each other
        label, (marker, colour) = plotted(f"{recipe} ({_counts(runs.size())})"), _marker(i)
        axis.errorbar(mean.index * apart, mean, spread, marker=marker, color=colour, label=label, capsize=3)
        for window in mean.index:
            text = f"{recipe}, T = {window}: {_mean(mean[window], spread[window])}"
            axis.plot(window * apart, mean[window], marker, color=colour, gid=tip(text))
    axis.set_xscale("log", base=2)
    windows = sorted(points["window"].unique())
    axis.set_xticks(windows, [str(window) for window in windows])
    axis.minorticks_off()
    title = f"{task}: mean and standard deviation over seeds"
    axis.set(xlabel="window T (samples)", ylabel=plotted(with_unit(metric)), title=title)
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


def side_by_side(pictures: Mapping[str, Pixels], title: str = "") -> Figure:
    """Draw pictures (H, W, 3) of one size side by side, each under its recipe.

    Columns of pixels that are the same in all of them (inputs and targets) are shown once.
    """
    panels = _shared_once(pictures)
    bands = max(1, sum(name == "input" for name, _ in panels))  # of samples beside each other, a line each
    most = min(PANELS_IN_A_LINE, -(-len(panels) // bands))
    lines = [panels[i : i + most] for i in range(0, len(panels), most)]
    widths = [sum(picture.shape[1] for _, picture in line) for line in lines]
    width = max(WIDTH, min(13.0, max(widths) / 150))  # inches; one dot to a pixel where that fits
    tall = 0.95 * panels[0][1].shape[0] / max(widths) * width  # a twentieth goes to the gaps
    titles = [_wrapped(name, 0.9 * width * picture.shape[1] / max(widths)) for name, picture in panels]
    above = 0.15 + 0.14 * max(title.count("\n") + 1 for title in titles)  # inches
    figure = Figure(figsize=(width, (tall + above) * len(lines) + 0.4), layout="constrained")
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    titled = iter(titles)
    for part, line, filled in zip(parts, lines, widths, strict=True):
        empty = max(widths) - filled
        ratios = [picture.shape[1] for _, picture in line] + ([empty] if empty > 0 else [])
        grid = part.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
        for axis in grid:
            axis.axis("off")
        for axis, (_, picture) in zip(grid, line, strict=False):
            axis.imshow(picture, interpolation="none")
            axis.set_title(next(titled), fontsize=SMALL)
    figure.suptitle(plotted(title), fontsize=9)
    return figure


def _wrapped(name: str, inches: float) -> str:
    """Break a recipe before arrows, and where a line would run into the next column."""
    characters = max(1, int(inches * 72 / (0.6 * SMALL)))  # a letter is some 0.6 of its height wide
    lines = [plotted(line) for line in name.replace("->", "\n->").splitlines()]
    return "\n".join(part for line in lines for part in wrap(line, characters, break_long_words=False))


def _shared_once(pictures: Mapping[str, Pixels]) -> list[tuple[str, Pixels]]:
    """Divide pictures into panels: a band of columns that all share (input; at the right end, target) is one panel."""
    stack = np.stack(list(pictures.values()))
    differs = (stack != stack[0]).any(axis=(0, 1, 3))
    if not differs.any():  # one picture, or the same one for all
        return list(pictures.items())
    edges = [0, *np.flatnonzero(np.diff(differs)) + 1, len(differs)]
    for start, stop in itertools.pairwise(edges):
        if stop - start <= 8:  # a gap of the grid, or by chance
            differs[start:stop] = True
    panels = []
    for start, stop in itertools.pairwise([0, *np.flatnonzero(np.diff(differs)) + 1, len(differs)]):
        if differs[start]:
            panels += [(name, picture[:, start:stop]) for name, picture in pictures.items()]
        else:
            panels.append(("target" if stop == len(differs) else "input", stack[0][:, start:stop]))
    return panels
