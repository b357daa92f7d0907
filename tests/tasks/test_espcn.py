import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qprune.errors import UserError
from qprune.tasks.espcn import Espcn
from qprune.training.task import DataOptions, Limits
from tests.tasks.adversarial_runs import train

SYNTHETIC = DataOptions(source="synthetic")


def task_with(limits: Limits, data: DataOptions = SYNTHETIC, **arguments: object) -> Espcn:
    task = Espcn(data=data, limits=limits, seed=0, **arguments)  # type: ignore[arg-type]
    task.optimizers()
    return task


def test_recipe_is_that_of_the_paper() -> None:
    task = task_with(Limits(epochs=200))
    assert task.train_batches.batch_size == 16
    assert isinstance(task.optimizer, torch.optim.Adam)
    assert task.optimizer.param_groups[0]["lr"] == 1e-3
    assert (task.example.shape, task.size_example.shape) == ((1, 1, 17, 17), (1, 1, 170, 170))


@pytest.mark.parametrize(("epochs", "drop"), [(200, 160), (10, 8), (4, 3), (5, 4)])
def test_learning_rate_drops_to_a_tenth_at_four_fifths(epochs: int, drop: int) -> None:
    task = task_with(Limits(epochs=epochs))
    rates = []
    for epoch in range(epochs):
        task.begin_epoch(epoch)
        rates.append(task.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3] * drop + [1e-4] * (epochs - drop))


def test_a_single_epoch_is_trained_at_the_full_rate() -> None:
    assert task_with(Limits(epochs=1)).learning_rate(0) == 1e-3


def test_the_network_gains_ten_decibels_on_the_synthetic_set_within_64_steps() -> None:
    task = task_with(Limits(epochs=4, steps_per_epoch=16, batch_size=32, test_samples=64))
    assert task.marks == ["synthetic data", "training set: 256 of 512"]
    untrained = task.evaluate()["psnr_db"]
    losses = train(task, 4)
    assert not losses["loss"].requires_grad
    assert task.evaluate()["psnr_db"] > untrained + 10


def test_evaluation_is_the_mean_over_whole_images() -> None:
    task = task_with(Limits(epochs=1, test_samples=2))
    assert task.marks == ["synthetic data", "test set: 2 of 5"]
    scores = []
    with torch.no_grad():
        for low, high in task.test_images:
            error = (task.network(low).clamp(0, 1) - high).square().mean().item()
            scores.append(-10 * math.log10(error))
    assert task.evaluate() == {"psnr_db": pytest.approx(sum(scores) / 2, abs=1e-4)}


def test_data_and_examples_move_with_the_task_and_stay_out_of_its_state() -> None:
    task = task_with(Limits(epochs=1))
    assert all(name.startswith("network.") for name in task.state_dict())
    moved = task.to("meta")
    tensors = (moved.train_batches.inputs, moved.example, moved.size_example, *moved.test_images[0])
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_the_real_images_make_the_recipe_without_marks(real_root: Path) -> None:
    task = task_with(Limits(epochs=200), DataOptions("real", str(real_root)))
    assert task.marks == []
    assert (task.train_batches.samples, len(task.train_batches), len(task.test_images)) == (2701, 169, 5)


def test_other_images_are_marked_and_may_lie_anywhere(tmp_path: Path) -> None:
    for folder in ("mine", "tests"):
        (tmp_path / folder).mkdir()
        Image.effect_noise((60, 64), 50).save(tmp_path / folder / "a.png")
    data = DataOptions("real", str(tmp_path / "nothing"))
    folders = {"train_folder": str(tmp_path / "mine"), "test_folder": str(tmp_path / "tests")}
    assert task_with(Limits(epochs=1), data, **folders).marks == [
        "train images: not those of the published 91-image set",
        "test images: not those of the published Set5",
    ]


def test_missing_folders_and_roots_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set; give the folder that holds t91 and set5, or type"):
        task_with(Limits(epochs=1), DataOptions("real"))
    (tmp_path / "t91").mkdir()
    Image.effect_noise((60, 64), 50).save(tmp_path / "t91" / "a.png")
    with pytest.raises(UserError, match=r"there is no folder .*set5; put the images there, .* task.test_folder=FOLDER"):
        task_with(Limits(epochs=1), DataOptions("real", str(tmp_path)))
    shutil.copy(tmp_path / "t91" / "a.png", tmp_path / "t91" / "b.png")
    (tmp_path / "t91" / "b.png").write_bytes((tmp_path / "t91" / "b.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"b\.png cannot be decoded"):
        task_with(Limits(epochs=1), DataOptions("real", str(tmp_path)))


def test_pictures_show_bicubic_output_and_original_side_by_side() -> None:
    task = task_with(Limits(epochs=1, test_samples=1))
    grid = task.pictures()["test"]
    low, high = task.test_images[0]
    height, width = high.shape[-2:]
    top, left = (height - 90) // 2, (width - 90) // 2
    assert (height, width) == (90, 90) or min(height, width) > 90
    cells = [grid[0, 2 : 2 + 150, 2 + 152 * column :][:, :150] for column in range(3)]
    middle = (150 - 90) // 2
    shown = [cell[middle : middle + 90, middle : middle + 90].float() / 255 for cell in cells]
    original = high[0, 0, top : top + 90, left : left + 90]
    assert (shown[2] - original).abs().max() <= 0.5 / 255 + 1e-6
    assert (shown[1] - task.network(low)[0, 0, top : top + 90, left : left + 90].clamp(0, 1)).abs().max() < 0.51 / 255
    assert not torch.equal(shown[0], shown[2])


def test_images_kept_apart_are_scored_and_not_trained_on() -> None:
    whole, limits = task_with(Limits(epochs=1)), Limits(epochs=1)
    task = task_with(limits, DataOptions(source="synthetic", validation=0.1))
    assert task.marks == ["synthetic data", "3 of 32 training images kept apart for choices"]
    assert (len(task.validation_images), len(task.test_images)) == (3, 5)
    patches = {patch.numpy().tobytes() for patch in task.train_batches.inputs}
    assert patches < {patch.numpy().tobytes() for patch in whole.train_batches.inputs}
    for low, _ in task.validation_images:
        assert low[0, :, :17, :17].contiguous().numpy().tobytes() not in patches
    found = task.evaluate()
    assert list(found) == ["psnr_db", "validation_psnr_db"]
    assert found["psnr_db"] == whole.evaluate()["psnr_db"] != found["validation_psnr_db"]
    with pytest.raises(
        UserError, match=r"data.validation=0.01 of 32 training samples is none; type 0, or at least 0.031"
    ):
        task_with(limits, DataOptions(source="synthetic", validation=0.01))


def test_further_test_sets_are_scored_beside_the_first(tmp_path: Path) -> None:
    for name, seed in (("t91", 0), ("set5", 1), ("set14", 2)):
        (tmp_path / name).mkdir()
        for index in range(2):
            pixels = np.random.default_rng([seed, index]).integers(0, 256, (60, 63, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    data = DataOptions(source="real", root=str(tmp_path))
    task = task_with(Limits(epochs=1), data, further_test_folders=["set14"])
    alone = task_with(Limits(epochs=1), data, test_folder="set14")
    found = task.evaluate()
    assert found.keys() == {"psnr_db", "psnr_db_set14"}
    assert found["psnr_db_set14"] == alone.evaluate()["psnr_db"] != found["psnr_db"]
    assert task.dataset["test set14"] == alone.dataset["test"]
    with pytest.raises(UserError, match=r"the folders' own names must differ and hold no dot"):
        task_with(Limits(epochs=1), data, further_test_folders=["set14", "./set14"])
    with pytest.raises(UserError, match=r"task.further_test_folders=\['set14'\] needs files: set data=real"):
        task_with(Limits(epochs=1), further_test_folders=["set14"])
