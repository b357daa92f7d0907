"""Folders of images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from qprune.errors import UserError

SUFFIXES = frozenset({".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".webp"})
FORMATS = ("PNG", "BMP", "JPEG", "TIFF", "WEBP")  # whatever a file's name: some others start programs


class NamedImage(NamedTuple):
    """A decoded RGB image and its name in error messages."""

    name: str
    image: Image.Image


def read_images(folder: Path, key: str) -> list[NamedImage]:
    """Read all images of `folder` (not of folders below it) by file name, decoded to RGB.

    Args:
        folder: Its files.
        key: The config key of the folder, for messages.

    Raises:
        UserError: The folder is missing or holds no image, or a file cannot be decoded.
    """
    remedy = (
        f"put the images there, set data.root=FOLDER or {key}=FOLDER to where they are, "
        "or type data=synthetic to run without files"
    )
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; {remedy}")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not paths:
        raise UserError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}); {remedy}")
    return [NamedImage(str(path), decoded(path)) for path in paths]


def decoded(path: Path) -> Image.Image:
    """Decode the image of a file to RGB, or raise UserError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    # Pillow reports damage by any of these, depending on the format and on where the file ends
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be decoded ({error}); fetch the file again, or remove it") from error
