"""What all figures share: colours, axes, labels, and their files."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qprune.atomic_write import write_atomically
from qprune.errors import visible
from qprune.runs.row import Row
from qprune.runs.scores import unit_of_score

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito: for all eyes
MARKERS = "osD^vPX"
WIDTH = 6.4  # inches
LONGEST = 200  # letters of a label
TIP = "tip: "  # begins the id of a group in the SVG; the rest is shown where the pointer rests on it
BETWEEN_TIPS = " | "  # separates the tips of a line's points
_ACRONYMS = {"psnr": "PSNR", "ssim": "SSIM", "fid": "FID", "map": "mAP"}

Pixels = npt.NDArray[Any]
Names = Mapping[str, str]  # with unit: of scores by metric, or of densities by task


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


def with_unit(metric: str, names: Mapping[str, str] = {}) -> str:
    """Name a metric with its unit, as `names` has it: `psnr_db` is PSNR (dB)."""
    if metric in names:
        return names[metric]
    unit = unit_of_score(metric)
    words = [_ACRONYMS.get(word, word) for word in (metric.rpartition("_")[0] if unit else metric).split("_")]
    return " ".join(words) + (f" ({unit})" if unit else "")


def title_of(row: Row) -> str:
    """Name task, recipe and seed of a row, and say so if it carries marks."""
    marked = "  (not comparable with the paper)" if row.marks else ""
    return plotted(f"{row.task}  {row.notation}  seed {row.seed}{marked}")
