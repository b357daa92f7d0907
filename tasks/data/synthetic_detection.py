"""Synthetic pictures with boxes: coloured shapes on a noisy ground, made in memory from a seed, offline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

from qprune.tasks.data.checksum import checksum
from qprune.tasks.data.detection import Sample
from qprune.tasks.data.seeds import generator

SHAPES = ("box", "disc", "triangle")
COLOURS = ((220.0, 60.0, 50.0), (60.0, 190.0, 80.0), (60.0, 90.0, 220.0))  # typical of each shape, in 0..255


class ShapePictures:
    """`count` pictures of `size` x `size` pixels with one to three shapes each, hardly overlapping.

    A class is a shape of approximately one colour. Every tenth object is faint and marked difficult. The seed is the
    set's own: runs of different seeds see the same pictures, as with a real set.
    """

    class_names: Sequence[str] = SHAPES

    def __init__(self, count: int, size: int = 96, part: str = "train", seed: int = 0) -> None:
        draw = generator(seed, "shapes", part)
        self.samples = [_picture(size, draw) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def checksum(self) -> str:
        """Return the sha256 of pictures and objects."""
        return checksum(tensor.numpy() for sample in self.samples for tensor in sample)


def _picture(size: int, draw: torch.Generator) -> Sample:
    ground = 100 + 60 * torch.rand(1, generator=draw)
    canvas = ground + 12 * torch.randn(3, size, size, generator=draw)
    wanted = int(torch.randint(1, 4, (1,), generator=draw))
    boxes, labels, difficult = torch.empty(0, 4), [], []
    for _ in range(20):  # attempts to place them
        box = _place(size, draw)
        if len(boxes) and float(box_iou(box[None], boxes).max()) > 0.05:
            continue
        kind = int(torch.randint(len(SHAPES), (1,), generator=draw))
        faint = bool(torch.rand(1, generator=draw) < 0.1)
        colour = torch.tensor(COLOURS[kind]) + 15 * torch.randn(3, generator=draw)
        strength = 0.25 if faint else 1.0
        inside = _inside(kind, box, size) * strength
        canvas = canvas + inside * (colour[:, None, None] - canvas)
        boxes = torch.cat((boxes, box[None]))
        labels.append(kind + 1)
        difficult.append(faint)
        if len(boxes) == wanted:
            break
    image = canvas.clamp(0, 255).round().to(torch.uint8)
    return Sample(image, boxes, torch.tensor(labels), torch.tensor(difficult))


def _place(size: int, draw: torch.Generator) -> Tensor:
    """Draw a box (4,) with sides of a quarter to a half of the picture's, at whole pixels inside it."""
    least, most = size // 4, size // 2
    sides = torch.randint(least, most + 1, (2,), generator=draw)
    corner = (torch.rand(2, generator=draw) * (size - sides + 1)).floor()
    return torch.cat((corner, corner + sides))


def _inside(kind: int, box: Tensor, size: int) -> Tensor:
    """Return 1 where the shape covers a pixel's centre, else 0: (size, size)."""
    centres = torch.arange(size) + 0.5
    # from -1 at the box's left and upper edges to 1 at its right and lower ones
    x = (2 * (centres - box[0]) / (box[2] - box[0]) - 1)[None, :]
    y = (2 * (centres - box[1]) / (box[3] - box[1]) - 1)[:, None]
    if SHAPES[kind] == "disc":
        covered = x.square() + y.square() <= 1
    elif SHAPES[kind] == "triangle":  # standing on its base
        covered = (2 * x.abs() <= 1 + y) & (y <= 1)
    else:
        covered = (x.abs() <= 1) & (y.abs() <= 1)
    return covered.float()
