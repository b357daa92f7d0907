"""Disks that are full or cannot be written, files that vanish or break, clocks that jump: an error, nothing lost."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from qprune.config import signature as identity
from qprune.errors import RunFailure, UserError
from qprune.runs.execute import execute
from qprune.training import checkpoint
from tests.faults.recipes import config_of, small
from tests.runs.test_execute import config as toy_config

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def mounted(place: Path, *options: str) -> bool:
    """Mount a small file system in memory at `place`; False where that is not allowed."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(place)], capture_output=True, check=False)
    return done.returncode == 0


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """A folder for a file system that is taken away again."""
    place = tmp_path / "disk"
    yield place
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def make_read_only(folder: Path) -> None:
    """Have `folder` appear read-only, whoever has files open elsewhere on its disk."""
    for options in (["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]):
        subprocess.run(["mount", *options], check=True, capture_output=True)


def steps_saved(folder: Path) -> int:
    saved = checkpoint.load_newest(folder / "checkpoints")
    assert saved is not None
    return int(saved["step"])


def before_updates(optimizer: type[torch.optim.Optimizer], act: Callable[[], object]) -> Any:
    """Return a context in which `act` is called before every update of an optimizer of this class."""
    step = optimizer.step

    def acting(self: Any, *args: Any) -> Any:
        act()
        return step(self, *args)

    return patch.object(optimizer, "step", acting)


def test_a_disk_that_is_full_in_the_middle_keeps_the_last_good_checkpoint(tmp_path: Path, mount_point: Path) -> None:
    """A real file system of 200 kB that something else fills up; the run ends when it does, and resumes when it may."""
    if not (ROOT and shutil.which("mount") and mounted(mount_point, "-o", "size=200k")):
        pytest.skip("file systems can only be mounted by root; the injected error of test_run covers the rest")
    expected = execute(toy_config(tmp_path / "whole"))
    cfg = toy_config(mount_point / "runs", "trainer.checkpoint_minutes=0")
    folder, filler = identity.run_folder(cfg), mount_point / "filler"

    def fill() -> None:
        if filler.exists() is False and len(checkpoint.steps(folder / "checkpoints")) == checkpoint.KEPT:
            with pytest.raises(OSError, match="No space left"):
                filler.write_bytes(bytes(1 << 20))

    refused = pytest.raises(RunFailure, match="no space is left on the disk to write .*; free some, or choose another")
    with before_updates(torch.optim.Adam, fill), refused:
        execute(cfg)
    assert steps_saved(folder) >= 2
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / "result.json").exists()
    filler.unlink()
    assert execute(cfg) == expected


def test_a_disk_that_is_full_from_the_start_is_named(mount_point: Path) -> None:
    if not (ROOT and shutil.which("mount") and mounted(mount_point, "-o", "size=8k")):
        pytest.skip("file systems can only be mounted by root")
    with pytest.raises(RunFailure, match="no space is left on the disk to write .*results_dir="):
        execute(toy_config(mount_point / "runs"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, mount_point: Path) -> None:
    if ROOT:  # whom permissions do not stop
        if not (shutil.which("mount") and mounted(mount_point, "-o", "ro,size=100k")):
            pytest.skip("file systems cannot be mounted here, and permissions do not stop root")
        place, reason = mount_point, "Read-only file system"
    else:
        place, reason = tmp_path / "mine", "Permission denied"
        place.mkdir(mode=0o500)
    with pytest.raises(UserError, match=rf"runs.* cannot be written \({reason}\); choose a folder that can, with"):
        execute(toy_config(place / "runs"))


def test_a_folder_that_becomes_read_only_keeps_the_checkpoints(tmp_path: Path, mount_point: Path) -> None:
    if not (ROOT and shutil.which("mount") and mounted(mount_point, "-o", "size=1m")):
        pytest.skip("file systems can only be mounted by root")
    expected = execute(toy_config(tmp_path / "whole"))
    cfg = toy_config(mount_point / "runs", "trainer.checkpoint_minutes=0")
    folder = identity.run_folder(cfg)
    closed: list[Path] = []

    def close() -> None:
        if not closed and len(checkpoint.steps(folder / "checkpoints")) == checkpoint.KEPT:
            closed.append(folder / "checkpoints")
            make_read_only(*closed)

    refused = pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)")
    try:
        with before_updates(torch.optim.Adam, close), refused:
            execute(cfg)
    finally:
        subprocess.run(["umount", str(folder / "checkpoints")], check=True, capture_output=True)
    assert steps_saved(folder) >= 2
    assert execute(cfg) == expected


def voc_of(root: Path, pictures: int) -> None:
    """A tiny set in the layout of VOC 2007: grey pictures with a box each, for training and testing."""
    folder = root / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    names = [f"{number:06d}" for number in range(pictures)]
    for name in names:
        Image.effect_noise((96, 80), 60).convert("RGB").save(folder / "JPEGImages" / f"{name}.jpg")
        box = "<bndbox><xmin>10</xmin><ymin>10</ymin><xmax>60</xmax><ymax>60</ymax></bndbox>"
        (folder / "Annotations" / f"{name}.xml").write_text(
            "<annotation><size><width>96</width><height>80</height><depth>3</depth></size>"
            f"<object><name>cat</name><difficult>0</difficult>{box}</object></annotation>"
        )
    for split in ("trainval", "test"):
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))


@pytest.mark.parametrize("damage", ["vanished", "corrupted"])
def test_a_picture_that_is_lost_in_mid_run_is_named_and_the_checkpoint_stays(damage: str, tmp_path: Path) -> None:
    """Detection reads pictures while it trains; the other tasks hold them in memory."""
    voc_of(tmp_path, 4)
    picture = tmp_path / "VOCdevkit" / "VOC2007" / "JPEGImages" / "000002.jpg"
    whole = picture.read_bytes()
    cfg = OmegaConf.create(
        config_of(
            *("task=faster_rcnn", "order=baseline", f"data.root={tmp_path}", "budget=smoke", "epochs=2"),
            *("budget.steps_per_epoch=3", "budget.batch_size=2", "budget.test_samples=2", "task.backbone=small"),
            *("task.pretrained=false", "task.short_side=96", "task.anchor_sizes=[24,32,48]", "task.rois=8"),
            *("task.proposals=8", "trainer.checkpoint_minutes=0", f"results_dir={tmp_path}/runs", "trainer.device=cpu"),
            *("trainer.threads=1", "budget.epochs=null", "trainer.keep_memory=false"),
        )
    )
    folder = identity.run_folder(cfg)

    def harm() -> None:
        if checkpoint.steps(folder / "checkpoints"):
            picture.unlink(missing_ok=True) if damage == "vanished" else picture.write_bytes(whole[:300])

    refused = pytest.raises(UserError, match=r"000002\.jpg cannot be decoded .*; fetch the file again, or remove it")
    with before_updates(torch.optim.SGD, harm), refused:
        execute(cfg)
    assert steps_saved(folder) >= 1
    picture.write_bytes(whole)
    row = execute(cfg)
    assert any("pictures" in mark for mark in row.marks), "fewer pictures than were published"


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the wall jumps by years in both directions, the steady one forward by hours (a machine asleep)."""
    expected = execute(toy_config(tmp_path / "whole"))
    real, steady, jumps = time.time, time.monotonic, iter(range(1, 10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(jumps) * 1e8)
    monkeypatch.setattr(time, "monotonic", lambda: steady() + 7200 * next(jumps))
    assert execute(toy_config(tmp_path / "jumping", "trainer.checkpoint_minutes=1")) == expected
    files = [identity.run_folder(toy_config(tmp_path / name)) / "network.safetensors" for name in ("whole", "jumping")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("task", ["espcn", "cifar", "pix2pix", "cyclegan", "faster_rcnn"])
def test_a_score_on_fewer_pictures_than_the_set_holds_says_so(task: str) -> None:
    from qprune.config.build import Recipe
    from qprune.training.setup import build_task

    tiny = {"pix2pix": ("task.image_size=32", "task.width=4"), "faster_rcnn": ("task.on_synthetic.short_side=96",)}
    overrides = small(task) if task in ("espcn", "cifar", "cyclegan") else (f"task={task}", "data=synthetic")
    limits = ("budget=smoke", "budget.test_samples=3", "budget.steps_per_epoch=2", "budget.batch_size=2")
    built = build_task(Recipe.from_config(config_of(*overrides, *limits, *tiny.get(task, ()))))
    assert any(mark.startswith("test set") and ": 3 of " in mark for mark in built.marks), built.marks
