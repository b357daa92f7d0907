"""What all figures share: colours, a page's width, names with units, and their files as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qprune.atomic_write import write_atomically
from qprune.reporting.units import unit_of_score
from qprune.runs.row import Row

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # Okabe and Ito: for all eyes
DARK = ("#0072b2", "#000000")  # of COLOURS: on these, letters are white
PHASES = {"P": "#fbe3d0", "Q": "#d6e8f5", "PQ": "#e6dcef"}
MARKERS = "osD^vPX"
MARKER_SIZE = 9.0  # points, of markers with text inside
WIDTH = 6.4  # inches


@dataclass(frozen=True)
class Drawn:
    """A finished figure. name: of its files, without suffix; svg keeps text as text, png has 150 dots per inch."""

    name: str
    caption: str
    svg: bytes
    png: bytes

    def save(self, folder: Path) -> None:
        """Write NAME.svg and NAME.png into `folder`."""
        write_atomically(folder / f"{self.name}.svg", self.svg)
        write_atomically(folder / f"{self.name}.png", self.png)


def drawn(figure: Figure, name: str, caption: str) -> Drawn:
    """Both forms of a figure; the same figure gives the same bytes."""
    svg = _content(figure, "svg", metadata={"Date": None})
    figure.set_layout_engine("none")  # laid out by now; once more would cost as much as drawing it
    return Drawn(name, caption, svg, _content(figure, "png", dpi=150))


def stacked(rows: int, height: float = 2.2, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width with `rows` axes of `height` inches below each other."""
    figure = Figure(figsize=(WIDTH, height * rows + 1.2), layout="constrained")
    axes = list(figure.subplots(rows, 1, squeeze=False, sharex=sharex)[:, 0])
    plain(axes)
    return figure, axes


def plain(axes: Iterable[Axes]) -> None:
    """Take away the lines at the top and on the right."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def inside(axis: Axes, at: tuple[float, float], text: str, marker: str, face: str, zorder: int) -> None:
    """Up to two letters within a marker of MARKER_SIZE and `zorder`: beside it they would lie over its neighbours.

    face: the colour that the marker is filled with.
    """
    down = {"^": -1.2, "v": 1.2}.get(marker, 0.0)  # points, to where a triangle is wide
    axis.annotate(
        text,
        at,
        xytext=(0, down),
        textcoords="offset points",
        ha="center",
        va="center_baseline",
        fontsize=5.5,
        color="#ffffff" if face in DARK else "#000000",
        zorder=zorder + 0.5,  # errorbar puts its markers a bit above what it is given
    )


def with_unit(metric: str, names: Mapping[str, str] | None = None) -> str:
    """A metric's name with its unit in brackets: as `names` has it, or else from its key: `psnr_db` is psnr (dB)."""
    if names and metric in names:
        return names[metric]
    unit = unit_of_score(metric)
    return f"{metric.rpartition('_')[0].replace('_', ' ')} ({unit})" if unit else metric.replace("_", " ")


def title_of(row: Row) -> str:
    """Task, recipe, seed; and that the row carries marks, if it does."""
    return f"{row.task}  {row.notation}  seed {row.seed}" + ("  (marked)" if row.marks else "")


def _content(figure: Figure, suffix: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "qprune", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=suffix, **options)
    return buffer.getvalue()
