"""CIFAR-10 from its published Python batches, checked, and unpickled without running code."""

from __future__ import annotations

import math
import pickle
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from qprune.errors import UserError

TRAIN_FILES: dict[str, str] = dict(CIFAR10.train_list)  # file name -> published md5
TEST_FILES: dict[str, str] = dict(CIFAR10.test_list)
ROWS, CLASSES = 10_000, 10
SHAPE = (3, 32, 32)


class ClassifiedPictures(NamedTuple):
    """Pictures (N, C, H, W) in uint8 with labels (N,) in int64, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_cifar10(root: str | Path, verify: bool = True, fetch: bool = True) -> tuple[ClassifiedPictures, list[str]]:
    """Read ROOT/cifar-10-batches-py, downloading it if none of its files is there.

    Args:
        root: Folder above.
        fetch: Download the set where none of its files is there.
        verify: Refuse files whose md5 is not the published one; without it such a copy is read, and marked.

    Returns:
        The pictures, and the row's marks.

    Raises:
        UserError: Files are missing and cannot be downloaded, differ, or hold no valid batch.
    """
    folder = Path(root) / CIFAR10.base_folder
    files = TRAIN_FILES | TEST_FILES
    if fetch and not any((folder / name).is_file() for name in files):
        _download(Path(root), folder)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(_absent(folder, missing))
    differing = [name for name, md5 in files.items() if not check_integrity(str(folder / name), md5)]
    if differing and verify:
        raise UserError(
            f"the md5 of {folder / differing[0]} is not the published one ({len(differing)} of {len(files)} files "
            f"differ: {', '.join(differing)}); fetch the data again, or accept this copy with data.verify=false, "
            "which is noted in the result row"
        )
    marks = [f"checksum of CIFAR-10 {', '.join(differing)} differs (data.verify=false)"] if differing else []
    train = [read_batch(folder / name) for name in TRAIN_FILES]
    test = [read_batch(folder / name) for name in TEST_FILES]
    return ClassifiedPictures(*_joined(train), *_joined(test)), marks


def read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read pictures (10000, 3, 32, 32) and labels (10000,) of one batch file, or raise UserError."""
    remedy = "fetch the data again, or type data=synthetic to run without files"
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="latin1").load()  # the published files were written by Python 2
        pictures, labels = batch["data"].pixels, np.asarray(batch["labels"])
    except Exception as error:  # a damaged pickle fails in nearly any way
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read as a CIFAR-10 batch ({reason}); {remedy}") from error
    if pictures.shape != (ROWS, math.prod(SHAPE)):
        raise UserError(f"{path} holds an array of shape {pictures.shape} instead of (10000, 3072); {remedy}")
    if labels.shape != (ROWS,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
        raise UserError(f"{path} does not hold {ROWS} labels from 0 to {CLASSES - 1}; {remedy}")
    return pictures.reshape(ROWS, *SHAPE), labels.astype(np.int64)


class _PickledType:
    """Stand-in for `numpy.dtype` while unpickling; its state (byte order and flags) is ignored."""

    def __init__(self, name: str, *_: object) -> None:
        if name != "u1":
            raise pickle.UnpicklingError(f"it holds an array of type {name}, not of bytes")

    def __setstate__(self, state: object) -> None:
        pass


class _PickledArray:
    """Stand-in for `numpy.ndarray` while unpickling: numpy's own would trust shapes and flags in the file."""

    pixels: NDArray[np.uint8]

    def __setstate__(self, state: tuple[int, tuple[int, ...], _PickledType, bool, str | bytes]) -> None:
        _, shape, _, fortran, content = state
        raw = content.encode("latin1") if isinstance(content, str) else content
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _ArraysOnly(pickle.Unpickler):
    """Unpickler of numbers, text, containers and arrays of bytes; any other name in the file is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the harmless counterpart of a name that a pickled array uses."""
        allowed: dict[tuple[str, str], Any] = {
            ("numpy.core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),  # as numpy 1 writes it
            ("numpy._core.multiarray", "_reconstruct"): lambda *_: _PickledArray(),  # as numpy 2 writes it
            ("numpy", "ndarray"): _PickledArray,
            ("numpy", "dtype"): _PickledType,
            ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR-10 batch needs")
        return allowed[module, name]


def _joined(batches: list[tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> tuple[Tensor, Tensor]:
    pictures, labels = zip(*batches, strict=True)
    return torch.from_numpy(np.concatenate(pictures)), torch.from_numpy(np.concatenate(labels))


def _download(root: Path, folder: Path) -> None:
    """Download the published archive into `folder`, atomically."""
    if not root.is_dir():
        raise UserError(
            f"data.root={root} is no folder; set data.root=FOLDER to the folder that holds {folder.name}, create "
            f"{root} to have CIFAR-10 downloaded there (170 MB), or type data=synthetic to run without files"
        )
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".cifar-10-download-") as partial:
            download_and_extract_archive(CIFAR10.url, partial, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
            (Path(partial) / CIFAR10.base_folder).replace(folder)
    except (OSError, RuntimeError) as error:
        files = list(TRAIN_FILES | TEST_FILES)
        raise UserError(_absent(folder, files, f", and {CIFAR10.url} could not be fetched ({error})")) from error


def _absent(folder: Path, missing: list[str], why: str = "") -> str:
    return (
        f"CIFAR-10 is not complete: {folder} lacks {', '.join(missing)}{why}; "
        f"set data.root=FOLDER to the folder that holds {folder.name}, or type data=synthetic to run without files"
    )
