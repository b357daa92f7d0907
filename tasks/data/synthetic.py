"""Synthetic data sets for tests and demonstrations: made in memory, offline, and learnable.

The seed is the set's own and not the run's: runs of different seeds see the same data, as with a real set.
"""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor

from qprune.tasks.data.cifar10 import ClassifiedPictures
from qprune.tasks.data.images import NamedImage
from qprune.tasks.data.seeds import generator

ANGLES = 5  # slopes of stripes, from horizontal to vertical
PERIODS = (4.0, 9.0)  # widths of stripes in pixels
CLASSES = ANGLES * len(PERIODS)


def classified_gratings(train: int = 5120, test: int = 1000, size: int = 32, seed: int = 0) -> ClassifiedPictures:
    """Draw striped pictures, (N, 3, size, size), whose class is the stripes' slope, width and approximate hue.

    Phase, brightness and noise are random, and hues of neighbouring classes overlap. Mirroring keeps the class (slopes
    have no sign), so that flips are a legal augmentation.
    """
    sets: list[Tensor] = []
    for part, samples in (("train", train), ("test", test)):
        draw = generator(seed, "gratings", part)
        # as many pictures of each class, in random order: any part of the set is mixed as well
        labels = torch.randperm(samples, generator=draw) % CLASSES
        sign = torch.randint(0, 2, (samples,), generator=draw) * 2 - 1
        angle = (labels % ANGLES) * sign * (math.pi / 2 / (ANGLES - 1))
        period = torch.tensor(PERIODS)[labels // ANGLES, None, None]
        phase = torch.rand(samples, 1, 1, generator=draw)
        stripes = 0.5 + 0.5 * torch.sin(2 * math.pi * (_along(size, angle) / period + phase))
        hue = labels / CLASSES + 0.06 * torch.randn(samples, generator=draw)  # in turns
        colour = 0.5 + 0.35 * torch.cos(2 * math.pi * (hue[:, None] - torch.arange(3) / 3))
        grey = torch.rand(samples, 1, 1, 1, generator=draw)
        pictures = grey + (colour[:, :, None, None] - grey) * stripes[:, None]
        pictures += 0.08 * torch.randn(pictures.shape, generator=draw)
        sets += [as_bytes(pictures), labels]
    return ClassifiedPictures(*sets)


def textured_pictures(count: int, size: int = 192, seed: int = 0, part: str = "train") -> list[NamedImage]:
    """Draw RGB pictures, size x size: plain and textured regions with sharp, straight edges.

    Textures are waves of at least 5 pixels, so that most of them survive downsampling to a third. A network can learn
    to restore the rest, and the edges.
    """
    draw = generator(seed, "textures", part)
    pictures = []
    for index in range(count):
        canvas = torch.rand(3, 1, 1, generator=draw).expand(3, size, size)
        for _ in range(12):
            directions = math.pi * torch.rand(4, generator=draw)
            periods = 5 + 20 * torch.rand(3, generator=draw)
            texture = torch.sin(2 * math.pi * _along(size, directions[:3]) / periods[:, None, None]).mean(dim=0)
            # a region is a straight band with edges about one pixel wide, somewhere across the picture
            middle, breadth = size * torch.rand(2, generator=draw) / torch.tensor([1, 8])
            band = _along(size, directions[3:])[0]
            region = torch.sigmoid(4 * (breadth - (band - middle).abs()))
            colour, strength = torch.rand(3, 1, 1, generator=draw), 0.3 * torch.rand(1, generator=draw)
            canvas = canvas + region * (colour + strength * texture - canvas)
        pixels = as_bytes(canvas).permute(1, 2, 0).contiguous().numpy()
        pictures.append(NamedImage(f"synthetic {part} picture {index}", Image.fromarray(pixels)))
    return pictures


def _along(size: int, angle: Tensor) -> Tensor:
    """Return each pixel's coordinate along directions `angle` (N,), radians: (N, size, size), in pixels."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return x * torch.cos(angle)[:, None, None] + y * torch.sin(angle)[:, None, None]


def as_bytes(pictures: Tensor) -> Tensor:
    """Convert pictures in 0..1 to uint8, rounded."""
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
