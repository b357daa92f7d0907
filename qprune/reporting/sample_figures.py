"""Pictures of several runs side by side."""

import itertools
from collections.abc import Mapping
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure

from qprune.reporting.plotting import WIDTH, Pixels, plotted

PANELS_IN_A_LINE = 6
SMALL = 7  # points, of titles over pictures


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
