"""The pictures of the page on concepts, drawn from the code that they are about, when docs are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import yaml
from torch import Tensor, nn

import qprune
from qprune.tasks.data.superres import ImagePairs
from qprune.tasks.data.synthetic import textured_pictures
from qprune.tasks.models.espcn import ESPCN

DOCS = Path(__file__).parents[1]
BLUE, ORANGE, GREY = "#2a6fb0", "#c8641b", "#8a8a8a"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "qprune",  # the same picture is the same file
    "savefig.bbox": "tight",
}


def order(file: Path) -> None:
    """Both orders of ESPCN along its 200 epochs: fraction of zeros, and when decimal bits freeze."""
    figure, axes = plt.subplots(2, 1, figsize=(7, 3.6), sharex=True, sharey=True)
    for axis, name in zip(axes, ("prune_first", "quantize_first"), strict=True):
        times = yaml.safe_load((DOCS.parent / f"configs/schedule/espcn/{name}.yaml").read_text(encoding="utf-8"))
        timeline = qprune.Schedule(**times).in_steps(steps_per_epoch=169, batch_size=16, window=16)
        epochs = [step / 169 for step in range(0, 200 * 169, 13)]
        zeros = [50 * timeline.fraction(timeline.prune_events(round(epoch * 169))) for epoch in epochs]
        axis.plot(epochs, zeros, color=BLUE, drawstyle="steps-post")
        axis.fill_between(epochs, zeros, step="post", color=BLUE, alpha=0.15)
        for start, what, side in ((times["t_qw"], "weights", "right"), (times["t_qf"], "features", "left")):
            axis.axvline(start, color=ORANGE, linewidth=1)
            place = start + (0.7 if side == "left" else -0.7)
            axis.text(
                place,
                4,
                f"{what}\nquantized,\nd frozen",
                color=ORANGE,
                fontsize=7.5,
                ha=side,
            )
        axis.set_title(f"order={name}", loc="left", fontsize=9)
        axis.set_ylabel("zeros in %")
        axis.set_xlim(120, 200)
        axis.set_ylim(0, 56)
    axes[-1].set_xlabel("epoch of 200 (the first 120 are float training in both)")
    _save(figure, file)


def mask(file: Path) -> None:
    """One channel of ESPCN's pruned feature: a sample, the window's sum of |x|, the mask, and what is left."""
    torch.manual_seed(0)
    network = ESPCN(3)
    low, _ = ImagePairs(textured_pictures(32, part="train"), 3, smallest=17).patches(17, 13)
    seen: dict[str, Tensor] = {}
    with torch.no_grad():
        network.conv1.weight *= 6  # features of an untrained network are faint
        network.conv2.weight *= 6
    handle = network.conv2.register_forward_hook(lambda _, __, output: seen.update(x=output.detach()))
    network(low[:16])
    handle.remove()
    pruner = qprune.Pruner(0.5)
    pruner.size_for_feature(seen["x"])
    pruner.observe(seen["x"])
    total = pruner.total.clone()
    pruner.update(pruner.total, 1.0)
    pruner.active = True
    sample, left = seen["x"][0], pruner(seen["x"])[0]
    # The channel that shows most: half of it kept, in many patches
    kept = pruner.mask.flatten(1).mean(1)
    edges = pruner.mask.diff(dim=1).abs().flatten(1).sum(1) + pruner.mask.diff(dim=2).abs().flatten(1).sum(1)
    channel = int(((kept - 0.5).abs() < 0.2).float().mul(edges).argmax())
    panels = [
        (sample[channel], "one sample's feature", "RdBu_r"),
        (total[channel], "|x| summed over T = 16", "viridis"),
        (pruner.mask[channel], "the mask: 1 is kept", "gray"),
        (left[channel], "feature times mask", "RdBu_r"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(7, 2.1))
    limit = float(sample[channel].abs().max())
    for axis, (picture, title, colours) in zip(axes, panels, strict=True):
        signed = {"vmin": -limit, "vmax": limit} if colours == "RdBu_r" else {}
        axis.imshow(picture.numpy(), cmap=colours, interpolation="nearest", **signed)
        axis.set_title(title, fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    _save(figure, file)


def decimal(file: Path) -> None:
    """The search of d* on a weight, and what the quantizer does to a number."""
    figure, (search, stairs) = plt.subplots(1, 2, figsize=(7, 2.5))
    torch.manual_seed(0)
    weight = nn.Conv2d(64, 32, 3).weight.detach()
    for bits, colour in ((4, ORANGE), (8, BLUE)):
        errors = [(qprune.quantize(weight, bits, torch.tensor(d)) - weight).square().mean().item() for d in range(14)]
        best = int(qprune.optimal_decimal(weight, bits))
        search.semilogy(range(14), errors, "o-", color=colour, markersize=3, label=f"{bits} bits: d* = {best}")
        search.plot([best], [errors[best]], "o", color=colour, markersize=8, fillstyle="none")
    search.set_xlabel("decimal bits d")
    search.set_ylabel("mean squared error")
    search.legend(frameon=False, fontsize=8)
    x = torch.linspace(-1.4, 1.4, 1401)
    stairs.plot(x, x, color=GREY, linewidth=0.8)
    for rounding, colour in (("trunc", BLUE), ("nearest", ORANGE)):
        y = qprune.quantize(x, 3, torch.tensor(2), rounding)
        stairs.plot(x, y, color=colour, linewidth=1.3, label=f"{rounding}, 3 bits, d = 2")
    stairs.set_xlabel("x")
    stairs.set_ylabel("Q(x, d)")
    stairs.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    _save(figure, file)


PICTURES = {"order": order, "mask": mask, "decimal": decimal}


def draw(folder: Path) -> None:
    """Draw all pictures into `folder`, as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE), torch.random.fork_rng(devices=[]):
        for name, picture in PICTURES.items():
            picture(folder / f"{name}.svg")


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("builder-inited", lambda app: draw(Path(app.srcdir, "pictures")))
    return {"parallel_read_safe": True}
