import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch

from qprune.errors import UserError
from qprune.tasks.data import cifar10
from qprune.tasks.data.cifar10 import TEST_FILES, TRAIN_FILES, load_cifar10, read_batch

NAMES = [*TRAIN_FILES, *TEST_FILES]
LABELS = [i % 10 for i in range(10_000)]


def pixels() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 128, (10_000, 3072), dtype=np.uint8)


def written(path: Path, batch: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(batch, protocol))
    return path


@pytest.fixture(scope="module")
def batch_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("cifar") / "data_batch_1", {"data": pixels(), "labels": LABELS})


@pytest.fixture
def root(tmp_path: Path, batch_file: Path) -> Path:
    """A folder laid out as CIFAR-10, with contents of our own."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in NAMES:
        os.link(batch_file, folder / name)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_options: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(cifar10, "download_and_extract_archive", unreachable)


# from protocol 4 on, names have a length before them, and numpy 1 never wrote the published files that way
@pytest.mark.parametrize(("protocol", "numpy_1"), [(2, True), (3, True), (2, False), (3, False), (4, False)])
def test_batches_are_read_as_any_numpy_wrote_them(tmp_path: Path, protocol: int, numpy_1: bool) -> None:
    path = written(tmp_path / "data_batch_1", {"data": pixels(), "labels": LABELS}, protocol)
    if numpy_1:
        path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    images, labels = read_batch(path)
    assert np.array_equal(images.reshape(10_000, -1), pixels())
    assert images.shape == (10_000, 3, 32, 32)
    assert labels.tolist() == LABELS


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo this must never run",)


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        ({"data": Evil(), "labels": LABELS}, r"it asks for \w+\.system, which no CIFAR-10 batch needs"),
        ({"data": np.zeros((10, 3072)), "labels": LABELS}, "it holds an array of type f8, not of bytes"),
        ({"data": np.zeros((10, 3072), np.uint8), "labels": LABELS}, r"holds an array of shape \(10, 3072\) instead"),
        ({"data": np.zeros((10_000, 3072), np.uint8), "labels": LABELS[1:]}, "does not hold 10000 labels from 0 to 9"),
        ({"data": np.zeros((10_000, 3072), np.uint8), "labels": [10] * 10_000}, "does not hold 10000 labels from 0"),
        ({"labels": LABELS}, "cannot be read as a CIFAR-10 batch"),
        ([1, 2, 3], "cannot be read as a CIFAR-10 batch"),
    ],
)
def test_a_file_that_is_no_batch_runs_nothing(
    tmp_path: Path, batch: object, problem: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "data_batch_1", batch)
    with pytest.raises(UserError, match=problem) as error:
        read_batch(path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith("fetch the data again, or type data=synthetic to run without files")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("kept", [0, 1, 100, 50_000, 30_000_000])
def test_a_truncated_file_is_named(tmp_path: Path, batch_file: Path, kept: int) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(batch_file.read_bytes()[:kept])
    with pytest.raises(UserError, match="test_batch cannot be read as a CIFAR-10 batch"):
        read_batch(path)


def test_a_differing_copy_is_refused_and_says_how_to_accept_it(root: Path) -> None:
    with pytest.raises(UserError) as error:
        load_cifar10(root)
    assert str(error.value) == (
        f"the md5 of {root}/cifar-10-batches-py/data_batch_1 is not the published one (6 of 6 files differ: "
        f"{', '.join(NAMES)}); fetch the data again, or accept this copy with data.verify=false, "
        "which is noted in the result row"
    )


def test_an_accepted_copy_is_marked(root: Path) -> None:
    pictures, marks = load_cifar10(root, verify=False)
    assert marks == [f"checksum of CIFAR-10 {', '.join(NAMES)} differs (data.verify=false)"]
    assert [tuple(t.shape) for t in pictures] == [(50_000, 3, 32, 32), (50_000,), (10_000, 3, 32, 32), (10_000,)]
    assert pictures.train_labels.dtype == torch.int64


def test_a_copy_with_published_checksums_is_unmarked(
    root: Path, batch_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    md5 = hashlib.md5(batch_file.read_bytes()).hexdigest()
    monkeypatch.setattr(cifar10, "TRAIN_FILES", dict.fromkeys(TRAIN_FILES, md5))
    monkeypatch.setattr(cifar10, "TEST_FILES", dict.fromkeys(TEST_FILES, md5))
    assert load_cifar10(root)[1] == []


def test_missing_files_are_named_and_nothing_is_fetched_over_the_others(root: Path, no_network: None) -> None:
    folder = root / "cifar-10-batches-py"
    for name in ("data_batch_3", "test_batch"):
        (folder / name).unlink()
    with pytest.raises(UserError) as error:
        load_cifar10(root)
    assert str(error.value) == (
        f"CIFAR-10 is not complete: {folder} lacks data_batch_3, test_batch; set data.root=FOLDER to the folder that "
        "holds cifar-10-batches-py, or type data=synthetic to run without files"
    )


def test_a_failed_download_says_so_and_leaves_nothing_behind(tmp_path: Path, no_network: None) -> None:
    with pytest.raises(UserError, match=r"could not be fetched \(<urlopen error no route to host>\); set data.root="):
        load_cifar10(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"data\.root=.*nowhere is no folder; set data\.root=FOLDER to the folder that"):
        load_cifar10(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_download_appears_in_one_piece(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(_url: str, partial: str, **_options: str) -> None:
        (root / "cifar-10-batches-py").rename(Path(partial) / "cifar-10-batches-py")

    monkeypatch.setattr(cifar10, "download_and_extract_archive", fetch)
    target = tmp_path / "elsewhere"
    target.mkdir()
    pictures, _ = load_cifar10(target, verify=False)
    assert len(pictures.test_labels) == 10_000
    assert [path.name for path in target.iterdir()] == ["cifar-10-batches-py"]


def test_the_real_set_has_the_statistics_it_is_normalised_with(real_root: Path) -> None:
    pictures, _ = load_cifar10(real_root, verify=False)
    mean = pictures.train_images.double().mean(dim=(0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert pictures.train_labels.bincount().tolist() == [5000] * 10
    assert pictures.test_labels.bincount().tolist() == [1000] * 10
