"""Pairs of pictures side by side in one image file, as in the facades: A on the left, B on the right."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from qprune.errors import UserError
from qprune.tasks.data.images import NamedImage, read_images
from qprune.tasks.data.translation import resized, sibling_advice

DIRECTIONS = ("AtoB", "BtoA")


def read_pairs(folder: Path, key: str, size: int, direction: str) -> Tensor:
    """Read all pairs of `folder` by file name: (N, 6, size, size) in uint8, the network's input before its target.

    Args:
        folder: Its images; grey ones become RGB.
        key: The config key of the folder, for messages.
        size: Side in pixels.
        direction: `AtoB` or `BtoA`.

    Raises:
        UserError: The folder is missing or empty, an image cannot be decoded, or a pair has an odd width.
    """
    if advice := sibling_advice(folder, key):
        raise UserError(f"there is no folder {folder}{advice}; or fetch the set with: qprune data get facades")
    return paired(read_images(folder, key), size, direction)


def paired(images: list[NamedImage], size: int, direction: str) -> Tensor:
    """Convert images with A left of B to (N, 6, size, size) in uint8; `BtoA` puts B first."""
    halves: dict[str, list[Image.Image]] = {"A": [], "B": []}
    for name, image in images:
        width, height = image.size
        if width % 2:
            raise UserError(
                f"{name} is {width}x{height}: a pair is two pictures of the same width side by side, and {width} is "
                "odd; crop the file to an even width, or remove it"
            )
        halves["A"].append(image.crop((0, 0, width // 2, height)))
        halves["B"].append(image.crop((width // 2, 0, width, height)))
    first, second = direction.split("to")
    return torch.cat((resized(halves[first], size), resized(halves[second], size)), dim=1)
