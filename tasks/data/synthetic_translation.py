"""Synthetic sets for image-to-image translation, made in memory from a seed of their own: learnable in seconds.

Paired: label maps (coloured rectangles, as the facades have them) and the pictures that they describe. Unpaired:
two domains that differ in the skin of their bodies, plain or striped, and in the tint of the background.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qprune.tasks.data.seeds import generator
from qprune.tasks.data.synthetic import as_bytes

RECTANGLES = 8  # per label map
# Labels in saturated colours, and what each of them looks like in a picture, in 0..1
LABELS = ((0.0, 0.0, 0.7), (0.0, 0.7, 1.0), (1.0, 0.8, 0.0), (0.9, 0.1, 0.1))
SURFACES = ((0.62, 0.52, 0.42), (0.35, 0.45, 0.55), (0.8, 0.78, 0.7), (0.4, 0.22, 0.15))
TRAIN, TEST = 64, 24  # pictures, of each domain


def label_maps_and_pictures(count: int, size: int, part: str, seed: int = 0) -> Tensor:
    """Draw pairs (count, 6, size, size) in uint8: a label map, then its picture.

    A picture is its labels' surfaces, lit from the left or from the right, with a rough texture: its colours follow
    from the labels, light and texture do not.
    """
    draw = generator(seed, "label maps", part)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    y, x = _axes(size)
    for _ in range(RECTANGLES):
        corner = torch.rand(count, 2, 1, 1, generator=draw) * 0.8
        extent = 0.1 + 0.3 * torch.rand(count, 2, 1, 1, generator=draw)
        inside = (y >= corner[:, 0]) & (y < corner[:, 0] + extent[:, 0])
        inside = inside & (x >= corner[:, 1]) & (x < corner[:, 1] + extent[:, 1])
        label = torch.randint(1, len(LABELS), (count, 1, 1), generator=draw)
        labels = torch.where(inside, label, labels)
    maps = torch.tensor(LABELS)[labels].permute(0, 3, 1, 2)
    light = 1 + 0.3 * (torch.rand(count, 1, 1, 1, generator=draw) - 0.5) * (2 * x - 1)
    texture = 0.04 * torch.randn(count, 1, size, size, generator=draw)
    pictures = torch.tensor(SURFACES)[labels].permute(0, 3, 1, 2) * light + texture
    return torch.cat((as_bytes(maps), as_bytes(pictures)), dim=1)


def plain_or_striped(count: int, size: int, part: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw two domains, each (count, 3, size, size) in uint8, of a round body on a meadow; no picture has a partner.

    A: brown bodies on green. B: bodies with black and white stripes, on a yellower green.
    """
    return _bodies(count, size, part, seed, striped=False), _bodies(count, size, part, seed, striped=True)


def _bodies(count: int, size: int, part: str, seed: int, striped: bool) -> Tensor:
    draw = generator(seed, "bodies", part, "striped" if striped else "plain")
    y, x = _axes(size)
    middle = 0.3 + 0.4 * torch.rand(count, 2, 1, 1, generator=draw)
    radius = 0.15 + 0.15 * torch.rand(count, 2, 1, 1, generator=draw)
    distance = ((y - middle[:, 0]) / radius[:, 0]) ** 2 + ((x - middle[:, 1]) / radius[:, 1]) ** 2
    body = torch.sigmoid(8 * (1 - distance))[:, None]
    meadow = torch.tensor([0.55, 0.6, 0.25] if striped else [0.3, 0.55, 0.25])[None, :, None, None]
    meadow = meadow + 0.2 * (torch.rand(count, 1, 1, 1, generator=draw) - 0.5)
    if striped:
        phase = torch.rand(count, 1, 1, generator=draw)
        skin = (0.5 + 0.45 * torch.sign(torch.sin(2 * torch.pi * (8 * x + phase))))[:, None].expand(-1, 3, -1, -1)
    else:
        brown = torch.tensor([0.5, 0.3, 0.15])[None, :, None, None]
        skin = brown * (0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=draw)).expand(-1, -1, size, size)
    texture = 0.03 * torch.randn(count, 1, size, size, generator=draw)
    return as_bytes(meadow + body * (skin - meadow) + texture)


def _axes(size: int) -> tuple[Tensor, Tensor]:
    """Return rows and columns of a picture as fractions of its side, each (size, size)."""
    along = (torch.arange(size) + 0.5) / size
    y, x = torch.meshgrid(along, along, indexing="ij")
    return y, x
