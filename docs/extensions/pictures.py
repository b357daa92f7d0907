"""Draw the figures of the page on concepts when the documentation is built.

`python docs/extensions/pictures.py FOLDER` draws that of the README, from `results/tables`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import qprune
from qprune.tasks.data.synthetic import classified_gratings

CONFIGS = Path(__file__).parents[2] / "configs"
TABLES = CONFIGS.parent / "results" / "tables"
BLUE, ORANGE, GREY = "#2a6fb0", "#c8641b", "#8a8a8a"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "qprune",  # the same picture is the same file
    "savefig.bbox": "tight",
}


def order() -> Any:
    """Draw both orders of ESPCN along its epochs: the fraction of zeros, and when quantization begins."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 3.6), sharex=True, sharey=True)
    _draw_orders(list(axes))
    return figure


def _draw_orders(axes: list[Any]) -> None:
    for axis, name in zip(axes, ("prune_first", "quantize_first"), strict=True):
        times = yaml.safe_load((CONFIGS / f"schedule/espcn/{name}.yaml").read_text(encoding="utf-8"))
        timeline = qprune.Schedule(**times).in_steps(steps_per_epoch=10)
        steps = range(1200, 2000, 10)
        zeros = [50 * float(timeline.fraction(timeline.prune_events(step))) for step in steps]
        epochs = [step / 10 for step in steps]
        axis.fill_between(epochs, zeros, step="post", color=BLUE, alpha=0.3)
        for start, what, side, shift in (
            (times["t_qw"], "weights", "right", -1),
            (times["t_qf"], "features", "left", 1),
        ):
            axis.axvline(start, color=ORANGE, linewidth=1)
            axis.text(start + shift, 55, f"{what}\nquantized", color=ORANGE, fontsize=7.5, ha=side)
        axis.set_title(name.replace("_", " "), loc="left", fontsize=9)
        axis.set(ylabel="zeros in %", xlim=(120, 200), ylim=(0, 80), yticks=(0, 25, 50))
    axes[-1].set_xlabel("epoch of 200 (the first 120 are float training in both)")


def overview() -> Any:
    """Draw when either order of ESPCN acts, and the score of each recipe against its size."""
    figure, axes = plt.subplot_mosaic([["first", "scores"], ["second", "scores"]], figsize=(10, 3.8))
    axes["second"].sharex(axes["first"])
    _draw_orders([axes["first"], axes["second"]])
    rows = pd.concat([pd.read_csv(TABLES / f"table{number}.csv") for number in (2, 3, 4)])
    rows = rows[(rows["part"] == "(c) ESPCN") & (rows["n"] > 1)].drop_duplicates("label").iloc[::-1]
    axis, sizes = axes["scores"], rows["weight_mb_actual"] + rows["feature_mb_actual"]
    cells = zip(rows["label"], rows["score"], rows["score_sd"], sizes, strict=True)
    for place, (label, score, spread, size) in enumerate(cells):
        colour = BLUE if label.startswith("P") else ORANGE if "P" in label else GREY
        axis.errorbar(score, place, xerr=spread, fmt="o", color=colour, capsize=3, markersize=5)
        axis.text(33.05, place, f"{size:.1f} Mb", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [label.replace("Baseline", "float") for label in rows["label"]], fontsize=8)
    axis.set(
        xlim=(30.5, 33.5), ylim=(-0.5, len(rows) - 0.5), xlabel="PSNR in dB, mean and standard deviation of 10 seeds"
    )
    axis.set_title("ESPCN: score and size of weights and features", loc="left", fontsize=9)
    figure.tight_layout()
    return figure


def mask() -> Any:
    """Draw one channel of a pruned feature: a sample, the window's sum of |x|, the mask, and the product."""
    pictures = F.avg_pool2d(classified_gratings(train=16, test=1).train_images.float() / 255 - 0.5, 2)
    with torch.no_grad():
        features = F.conv2d(pictures, torch.randn(8, 3, 5, 5), padding=2)
    pruner = qprune.Pruner(0.5)
    pruner.size_for_feature(features)
    pruner.observe(features)
    total = pruner.window.clone()
    pruner.update(total, 1.0)
    pruner.active = True
    channel = int((pruner.mask.flatten(1).mean(1) - 0.5).abs().argmin())  # about half of it is kept
    limit = float(features[0, channel].abs().max())
    signed = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    panels: list[tuple[Any, str, dict[str, Any]]] = [
        (features[0], "one sample's feature", signed),
        (total, "|x| summed over T = 16", {"cmap": "viridis"}),
        (pruner.mask, "the mask: 1 is kept", {"cmap": "gray"}),
        (pruner(features)[0], "feature times mask", signed),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(7, 2.1))
    for axis, (tensor, title, style) in zip(axes, panels, strict=True):
        axis.imshow(tensor[channel].detach().numpy(), interpolation="nearest", **style)
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
    return figure


def decimal() -> Any:
    """Draw the search of d on a weight, and the quantizer's staircase."""
    figure, (search, stairs) = plt.subplots(1, 2, figsize=(7, 2.5))
    weight = nn.Conv2d(64, 32, 3).weight.detach()
    for bits, colour in ((4, ORANGE), (8, BLUE)):
        rounded = [qprune.fake_quantize(weight, bits, torch.tensor(d)) for d in range(14)]
        errors = [(each - weight).square().mean().item() for each in rounded]
        best = int(qprune.optimal_decimal(weight, bits))
        search.semilogy(range(14), errors, "o-", color=colour, markersize=3, label=f"{bits} bits: d* = {best}")
        search.plot([best], [errors[best]], "o", color=colour, markersize=8, fillstyle="none")
    search.set(xlabel="fraction bits d", ylabel="mean squared error")
    x = torch.linspace(-1.4, 1.4, 1401)
    stairs.plot(x, x, color=GREY, linewidth=0.8)
    for rounding, colour in (("trunc", BLUE), ("nearest", ORANGE)):
        y = qprune.fake_quantize(x, 3, torch.tensor(2), rounding)
        stairs.plot(x, y, color=colour, linewidth=1.3, label=f"{rounding}, 3 bits, d = 2")
    stairs.set(xlabel="x", ylabel="Q(x, d)")
    for axis in (search, stairs):
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def draw(folder: Path) -> None:
    """Draw all figures of the page into `folder`."""
    save(folder, order, mask, decimal)


def save(folder: Path, *pictures: Callable[[], Any]) -> None:
    """Draw figures into `folder`, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        with plt.rc_context(STYLE), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            figure = picture()
            figure.savefig(folder / f"{picture.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", lambda app: draw(Path(app.srcdir, "pictures")))
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    save(Path(sys.argv[1]), overview)
