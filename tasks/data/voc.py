"""Pascal VOC 2007 from the files of its development kit, checked as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import VOCDetection

from qprune.errors import UserError
from qprune.tasks.data.detection import Sample
from qprune.tasks.data.images import decoded

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
PUBLISHED = {"train": 2501, "val": 2510, "trainval": 5011, "test": 4952}  # pictures per split
FOLDER = Path("VOCdevkit") / "VOC2007"
REMEDY = "fetch the data again, or leave the picture out of the split's list"


class Annotation(NamedTuple):
    """The objects of one picture, as in `Sample`, and its size (width, height) in pixels."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    size: tuple[int, int]


class VocPictures:
    """A split of VOC 2007: a list of names in ImageSets/Main, published or your own.

    Annotations are read at once, pictures at each access. Where no VOC 2007 is below `root`, published splits are
    downloaded there through torchvision.

    Args:
        root: Folder of VOCdevkit.
        split: Name of the list.
        key: The config key of the split, for messages.
        fetch: Whether to download.

    Raises:
        UserError: A file is missing or not valid.
    """

    class_names: Sequence[str] = CLASSES

    def __init__(self, root: str | Path, split: str, key: str, fetch: bool = True) -> None:
        self.folder = Path(root) / FOLDER
        if fetch and not self.folder.is_dir():
            _download(Path(root), split, key)
        self.names = _names(self.folder, split, key)
        self.annotations = [read_annotation(self.folder / "Annotations" / f"{name}.xml") for name in self.names]
        for name in self.names:
            if not self._picture(name).is_file():
                raise UserError(f"{self._picture(name)} is missing, and {key}={split} names it; {REMEDY}")

    def _picture(self, name: str) -> Path:
        return self.folder / "JPEGImages" / f"{name}.jpg"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        path, annotation = self._picture(self.names[index]), self.annotations[index]
        image: Image.Image = decoded(path)
        if image.size != annotation.size:
            raise UserError(
                f"{path} is {image.width}x{image.height} pixels, and its annotation was made for "
                f"{annotation.size[0]}x{annotation.size[1]}: its boxes would be off; {REMEDY}"
            )
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Sample(pixels, annotation.boxes, annotation.labels, annotation.difficult)

    def checksum(self) -> str:
        """Return the sha256 over the names of the pictures, their files and their objects."""
        digest = hashlib.sha256()
        for name, annotation in zip(self.names, self.annotations, strict=True):
            digest.update(name.encode())
            digest.update(self._picture(name).read_bytes())
            for tensor in annotation[:3]:
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def read_annotation(path: Path) -> Annotation:
    """Read the objects of an annotation file, which may have none; boxes are clipped to the picture.

    Raises:
        UserError: The file is missing or no VOC annotation, a class is unknown, or a box has no area in the picture.
    """
    try:
        tree = VOCDetection.parse_voc_xml(ElementTree.parse(path).getroot())["annotation"]
        size = int(tree["size"]["width"]), int(tree["size"]["height"])
        objects = [_object(entry, size) for entry in tree.get("object", [])]
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {REMEDY}") from error
    except (OSError, ElementTree.ParseError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}; mend the file, or {REMEDY}") from error
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read as a VOC annotation ({reason}); {REMEDY}") from error
    boxes = torch.tensor([box for box, _, _ in objects], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([label for _, label, _ in objects], dtype=torch.int64)
    return Annotation(boxes, labels, torch.tensor([hard for _, _, hard in objects], dtype=torch.bool), size)


def _object(entry: dict[str, Any], size: tuple[int, int]) -> tuple[list[float], int, bool]:
    """Return box, label and whether it is difficult. Corners in the file are pixels from 1, both inside the box."""
    name, corners = entry["name"], entry["bndbox"]
    if name not in CLASSES:
        raise UserError(f"the class {name!r} is not one of VOC's ({', '.join(CLASSES)})")
    x1, y1, x2, y2 = (float(corners[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
    width, height = size
    box = [max(x1 - 1, 0.0), max(y1 - 1, 0.0), min(x2, float(width)), min(y2, float(height))]
    if not (box[0] < box[2] and box[1] < box[3]):
        raise UserError(
            f"the box {x1:g}, {y1:g}, {x2:g}, {y2:g} of a {name} has no area inside the picture of {width}x{height}"
        )
    return box, 1 + CLASSES.index(name), entry.get("difficult", "0") == "1"


def _names(folder: Path, split: str, key: str) -> list[str]:
    lists = folder / "ImageSets" / "Main"
    try:
        lines = (lists / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        there = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
        raise UserError(
            f"{key}={split}: there is no readable list {lists / split}.txt (lists there: {there}); choose one of "
            f"them with {key}=NAME, set data.root=FOLDER to the folder that holds VOCdevkit, or type data=synthetic"
        ) from error
    names = [line.split()[0] for line in lines if line.strip()]
    if not names:
        raise UserError(f"{key}={split}: {lists / split}.txt names no picture; choose another list")
    return names


def _download(root: Path, split: str, key: str) -> None:
    """Download the published archives, which unpack into the same folder."""
    try:
        if not root.is_dir():
            raise ValueError(f"{root} is no folder; create it to have VOC 2007 downloaded there, 900 MB")
        if split not in PUBLISHED:
            raise ValueError(f"{key}={split} is not a published split ({', '.join(PUBLISHED)})")
        for part in ("trainval", "test"):
            VOCDetection(str(root), year="2007", image_set=part, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"there is no {root / FOLDER}, and it could not be fetched ({error}); set data.root=FOLDER to the folder "
            "that holds VOCdevkit, or type data=synthetic to run without files"
        ) from error
