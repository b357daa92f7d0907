"""Sizes and conversions of pictures for image-to-image translation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qprune.tasks.data.images import NamedImage
from qprune.training.task import DataOptions, Limits

SIZE = 256  # pixels of a side, in the paper
SMALL = 64  # of synthetic data with a budget that cuts epochs short
ENLARGED = 286 / 256  # training pictures are this much larger than the crops taken from them


def is_trial(data: DataOptions, limits: Limits) -> bool:
    """Return whether a run is on synthetic data in shortened epochs, for which small pictures and networks do."""
    return data.source == "synthetic" and limits.steps_per_epoch is not None


def enlarged(size: int) -> int:
    """Return the side of the training pictures from which crops of `size` pixels are taken: 286 for 256."""
    return round(size * ENLARGED)


def resized(images: Sequence[NamedImage | Image.Image], size: int) -> Tensor:
    """Resize RGB images bicubically to squares: (N, 3, size, size) in uint8."""
    pictures = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for row, item in enumerate(images):
        image = item.image if isinstance(item, NamedImage) else item
        square = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
        pictures[row] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return pictures


def signed(pictures: Tensor) -> Tensor:
    """Convert pictures (N, 3, H, W) in uint8 to -1..1 in float32, the networks' range."""
    return pictures.float().div(127.5).sub(1)


def in_bytes(pictures: Tensor) -> Tensor:
    """Convert pictures (N, 3, H, W) in -1..1 to uint8, truncated as in the authors' code."""
    return pictures.float().clamp(-1, 1).add(1).mul(127.5).to(torch.uint8)


def sibling_advice(folder: Path, key: str) -> str:
    """Return `; ... holds a, b: name one of them with key=...` for the folders beside a missing one, or nothing."""
    if folder.is_dir() or not folder.parent.is_dir():
        return ""
    names = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
    return (
        f"; {folder.parent} holds {', '.join(names)}: name one of them with {key}={folder.parent}/..." if names else ""
    )


def other_than(what: str, given: int, papers: int) -> list[str]:
    """Return a mark where a run's size is not the paper's."""
    return [] if given == papers else [f"{what}: {given} instead of {papers}"]
