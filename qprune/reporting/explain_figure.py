"""The figure of `qprune explain`: terms of the difference, scores around events, noise and masks per tensor."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qprune.reporting.explain import NAMES, Explanation
from qprune.reporting.figures import COLOURS, MARKERS, axes_of, plotted

MOST_TENSORS = 24  # that are named on an axis
_BESIDE: dict[str, Any] = {"xytext": (4, -8), "textcoords": "offset points"}


def draw(found: Explanation) -> Figure:
    """Draw what was measured of two runs; a panel without numbers says so."""
    figure, axes = axes_of(2, 2, 11.0, 8.0)
    _terms(axes[0], found)
    _events(axes[1], found)
    last = found.tensors[found.tensors["event"] == "end"] if len(found.tensors) else found.tensors
    _per_tensor(axes[2], last, "sqnr_pruned", "signal to quantization noise (dB)")
    _masks(axes[3], found.masks)
    title = [plotted(f"{name}: {label}") for name, label in zip(NAMES, found.labels, strict=True)]
    figure.suptitle("\n".join(title), fontsize=9)
    return figure


def _terms(axis: Axes, found: Explanation) -> None:
    axis.set_title(f"A minus B, and what it is made of{found.unit and f' ({found.unit.strip()})'}", fontsize=9)
    if not len(found.terms):
        return _nothing(axis, "no states around events were kept by both")
    terms = found.terms.fillna(0.0)
    names = [*terms["term"], "in all"]
    values = [*(terms["A"] - terms["B"]), float((terms["A"] - terms["B"]).sum())]
    places = np.arange(len(names))[::-1]
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    axis.barh(places, values, color=colours)
    axis.set_yticks(places, [name.replace(" and ", "\nand ") for name in names], fontsize=8)
    axis.axvline(0, color="#000000", lw=0.8)
    return None


def _events(axis: Axes, found: Explanation) -> None:
    axis.set_title("score before and after each event", fontsize=9)
    lines = found.events.dropna(subset=["before"]) if len(found.events) else found.events
    if not len(lines):
        return _nothing(axis, "no states around events were kept")
    for place, (name, group) in enumerate(lines.groupby("run")):
        epochs = np.repeat(group["epoch"].to_numpy(), 2)
        scores = group[["before", "after"]].to_numpy().flatten()
        axis.plot(epochs, scores, color=COLOURS[place], marker=MARKERS[place], ms=3, lw=1, label=str(name))
        for line in group.itertuples():
            axis.annotate(str(line.phase), (line.epoch, line.after), fontsize=7, color=COLOURS[place], **_BESIDE)
    axis.set(xlabel="epoch", ylabel=f"score{found.unit and f', {found.unit.strip()}'}")
    axis.margins(x=0.12)
    axis.legend(fontsize=7)
    return None


def _per_tensor(axis: Axes, last: pd.DataFrame, column: str, label: str) -> None:
    axis.set_title(f"{label}, at the end", fontsize=9)
    if column not in last or not last[column].notna().any():
        return _nothing(axis, "no tensor is quantized")
    last = last.assign(name=last["kind"].str[0] + " " + last["tensor"]).replace([np.inf, -np.inf], np.nan)
    names = list(dict.fromkeys(last["name"]))
    for place, (run, group) in enumerate(last.groupby("run")):
        at = [names.index(name) for name in group["name"]]
        axis.plot(at, group[column], MARKERS[place], color=COLOURS[place], ms=4, label=str(run))
    _name_tensors(axis, names)
    axis.legend(fontsize=7)
    return None


def _masks(axis: Axes, masks: pd.DataFrame) -> None:
    axis.set_title("share of A's zeros that are B's too", fontsize=9)
    if not len(masks):
        return _nothing(axis, "the runs have no mask in common")
    names = list(masks["kind"].str[0] + " " + masks["tensor"])
    axis.bar(range(len(names)), masks["shared"], color=COLOURS[2], label="shared")
    axis.plot(range(len(names)), masks["by_chance"], "_", color="#000000", ms=8, label="by chance")
    axis.set_ylim(0, 1.05)
    _name_tensors(axis, names)
    axis.legend(fontsize=7)
    return None


def _name_tensors(axis: Axes, names: list[str]) -> None:
    step = max(1, -(-len(names) // MOST_TENSORS))
    shown = [plotted(name) for name in names[::step]]
    axis.set_xticks(range(0, len(names), step), shown, rotation=60, ha="right", fontsize=8)


def _nothing(axis: Axes, why: str) -> None:
    axis.text(0.5, 0.5, why, ha="center", va="center", fontsize=8, transform=axis.transAxes)
    axis.set(xticks=[], yticks=[])
