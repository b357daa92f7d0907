"""What tensors of a run look like: histograms of features (Fig. 2), feature masks, sample pictures (Figs. 3, 5, 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from qprune.reporting.drawing import COLOURS, PHASES, WIDTH, plain, title_of
from qprune.runs.row import Row

SITES = 9  # features whose histograms are shown, evenly chosen from a network's
PANELS_IN_A_LINE = 6
_SMALL = 7  # points, of titles over pictures

Pixels = npt.NDArray[Any]


def feature_histograms(sites: Sequence[Mapping[str, Any]], row: Row) -> Figure:
    """Fig. 2: values of features on a logarithmic count, with the range that each one's grid can hold shaded.

    sites: as histograms.json has them. What lies outside the range is clipped.
    """
    chosen = [sites[i] for i in sorted({round(i) for i in np.linspace(0, len(sites) - 1, min(SITES, len(sites)))})]
    columns = min(3, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH / 1.6, 1.9 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    plain(grid)
    for axis in grid[len(chosen) :]:
        axis.set_visible(False)
    for i, (axis, site) in enumerate(zip(grid, chosen, strict=False)):
        edges = site["start"] + site["width"] * np.arange(len(site["counts"]) + 1)
        counts = np.array(site["counts"])
        axis.axvspan(site["low"], site["high"], color=PHASES["Q"], lw=0, zorder=0, label="range of the grid")
        axis.stairs(np.maximum(counts, 0.5), edges, baseline=0.5, fill=True, color=COLOURS[0], label="values")
        axis.set_yscale("log")
        axis.set_ylim(0.5, 2 * counts.max())
        outside = (site["below"] + site["above"]) / site["elements"]
        axis.set_title(
            f"{site['site']}\n{site['bits']} bits, d* = {site['decimal']}, {outside:.2%} outside", fontsize=7
        )
        axis.tick_params(labelsize=7)
        if i % columns == 0:
            axis.set_ylabel("elements", fontsize=7)
        axis.set_xlabel("value", fontsize=7)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncols=2, loc="outside lower center")
    more = f" ({len(chosen)} of {len(sites)} features)" if len(chosen) < len(sites) else ""
    figure.suptitle(title_of(row) + more, fontsize=9)
    return figure


def masks(features: Mapping[str, Pixels], channels: int = 16) -> Figure:
    """Feature masks (C, H, W) as pictures, the first `channels` of each; black is pruned, grey lies between masks."""
    names = list(features)
    figure = Figure(figsize=(WIDTH, 1.9 * len(names) + 0.3), layout="constrained")
    grid = figure.subplots(len(names), 1, squeeze=False)
    for axis, name in zip(grid[:, 0], names, strict=True):
        mask = features[name][:channels].astype(float)
        tiles = list(np.pad(mask, ((0, 0), (1, 1), (1, 1)), constant_values=0.5))
        half = (len(tiles) + 1) // 2
        tiles += [np.ones_like(tiles[0])] * (2 * half - len(tiles))
        lines = [np.concatenate(tiles[start : start + half], axis=1) for start in (0, half)]
        axis.imshow(np.concatenate(lines), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        size = " x ".join(map(str, features[name].shape))
        pruned = f"{1 - features[name].mean():.1%} of {size} neurons pruned"
        axis.set_title(f"{name}: {pruned}; channels 0 to {len(mask) - 1}", fontsize=8)
        axis.axis("off")
    return figure


def side_by_side(pictures: Mapping[str, Pixels], title: str = "") -> Figure:
    """Pictures (H, W, 3) in uint8 of one size beside each other, each under its recipe.

    Columns of pixels at the left and right ends that are the same in all of them (inputs and targets) are shown once.
    """
    panels = list(_shared_once(pictures).items())
    lines = [panels[i : i + PANELS_IN_A_LINE] for i in range(0, len(panels), PANELS_IN_A_LINE)]
    widths = [sum(picture.shape[1] for _, picture in line) for line in lines]
    width = max(WIDTH, min(13.0, max(widths) / 150))  # inches; one dot to a pixel where that fits
    tall = 0.95 * panels[0][1].shape[0] / max(widths) * width  # a twentieth goes to the gaps
    figure = Figure(figsize=(width, (tall + 0.5) * len(lines) + 0.4), layout="constrained")
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    for part, line, filled in zip(parts, lines, widths, strict=True):
        empty = max(widths) - filled
        ratios = [picture.shape[1] for _, picture in line] + ([empty] if empty > 0 else [])
        grid = part.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
        for axis in grid:
            axis.axis("off")
        for axis, (name, picture) in zip(grid, line, strict=False):
            axis.imshow(picture, interpolation="none")
            axis.set_title(_wrapped(name, 0.9 * width * picture.shape[1] / max(widths)), fontsize=_SMALL)
    figure.suptitle(title, fontsize=9)
    return figure


def _wrapped(name: str, inches: float) -> str:
    """A recipe over a column of that width: broken before arrows, and where a line would run into the next column."""
    characters = max(1, int(inches * 72 / (0.6 * _SMALL)))  # a letter is some 0.6 of its height wide
    lines = name.replace("->", "\n->").splitlines()
    return "\n".join(part for line in lines for part in wrap(line, characters, break_long_words=False))


def _shared_once(pictures: Mapping[str, Pixels]) -> dict[str, Pixels]:
    """The part of each picture that differs from the others', between what all share at the left and at the right."""
    first, *others = pictures.values()
    differs = np.zeros(first.shape[1], dtype=bool)
    for other in others:
        differs |= (first != other).any(axis=(0, 2))
    if not differs.any():  # one picture, or the same one for all
        return dict(pictures)
    places = differs.nonzero()[0]
    left, right = int(places[0]), int(places[-1]) + 1
    shown = {"input": first[:, :left]} if left > 8 else {}
    shown |= {name: picture[:, left:right] for name, picture in pictures.items()}
    return shown | ({"target": first[:, right:]} if first.shape[1] - right > 8 else {})
