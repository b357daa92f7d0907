from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qprune.cli import main as cli
from qprune.errors import UserError
from qprune.runs.folder import read_rows
from qprune.tasks.data.translation import signed
from qprune.tasks.pix2pix import Pix2Pix
from qprune.training.task import DataOptions, Limits
from tests.tasks.adversarial_runs import train

SYNTHETIC = DataOptions("synthetic")


def task_with(limits: Limits | None = None, data: DataOptions = SYNTHETIC, **arguments: Any) -> Pix2Pix:
    limits = limits or Limits(epochs=4, steps_per_epoch=16, batch_size=32, test_samples=8)
    task = Pix2Pix(data=data, limits=limits, seed=0, **{"image_size": 32, "width": 8} | arguments)
    task.optimizers()
    return task


def test_recipe_of_pix2pix_is_that_of_the_paper() -> None:
    task = task_with(Limits(epochs=300), image_size=None, width=None)
    assert sum(p.numel() for p in task.paper_network.parameters()) == 54_414_083
    assert (task.train_batches.batch_size, task.l1_weight) == (1, 100.0)
    assert (task.example.shape, task.train_batches.inputs.shape[1:]) == ((1, 3, 256, 256), (6, 286, 286))
    for optimizer in (task.generator_optimizer, task.judge_optimizer):
        assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (2e-4, (0.5, 0.999))
    assert task.marks == ["synthetic data"]


@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"), [(0, 300, 1), (199, 300, 1), (200, 300, 100 / 101), (299, 300, 1 / 101), (3, 4, 0.5)]
)
def test_learning_rates_fall_in_the_last_third_of_a_translation(epoch: int, epochs: int, factor: float) -> None:
    task = task_with(Limits(epochs=epochs, steps_per_epoch=1, test_samples=2))
    task.begin_epoch(epoch)
    for optimizer in (task.generator_optimizer, task.judge_optimizer):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-4 * factor)


def test_small_runs_of_pix2pix_leave_marks() -> None:
    task = task_with(image_size=None, width=None)
    assert task.marks == [
        "synthetic data",
        "training set: 16 of 64",
        "test set: 8 of 24",
        "image size: 64 instead of 256",
        "width: 32 instead of 64",
    ]
    assert task.depth == 6


def test_generated_pictures_come_closer_to_their_targets() -> None:
    task = task_with(learning_rate=1e-3)
    before = task.evaluate()
    losses = train(task, 4)
    after = task.evaluate()
    assert after["l1"] < 0.75 * before["l1"]
    assert after["fid_proxy"] < before["fid_proxy"]
    assert {*losses} == {"generator", "l1", "judge"}
    assert not any(loss.requires_grad for loss in losses.values())


def test_a_step_trains_each_network_by_its_own_loss_alone() -> None:
    task = task_with()
    task.train()
    [batch] = list(task.train_batches.epoch(0))[:1]
    task.train_step(batch)
    generator = [p.grad.clone() for p in task.network.parameters()]
    judge = [p.grad.clone() for p in task.judge.parameters()]
    assert all(g.any() for g in (*generator[:1], *judge[:1]))
    source, target = signed(batch[0]).chunk(2, dim=1)
    assert source.shape == target.shape == (1, 3, 32, 32)
    # zero rates: what the judge learns does not depend on the weight of the generator's other loss
    for weight in (0.0, 1000.0):
        torch.manual_seed(0)
        again = task_with(l1_weight=weight)
        again.train()
        again.train_step(batch)
        twin = [p.grad for p in again.judge.parameters()]
        if weight == 0.0:
            first = [gradient.clone() for gradient in twin]
    assert all(torch.equal(a, b) for a, b in zip(first, twin, strict=True))


@pytest.mark.parametrize("like_training", [True, False])
def test_evaluation_of_pix2pix_changes_nothing(like_training: bool) -> None:
    task = task_with(test_like_training=like_training, image_size=64)  # from 64 pixels on there is dropout
    task.train()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    torch.manual_seed(1)
    metrics = task.evaluate()
    assert all(module.training for module in task.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    torch.manual_seed(1)
    assert task.evaluate() == metrics
    torch.manual_seed(2)
    assert (task.evaluate() == metrics) is not like_training  # dropout drops at test time, as in the authors' code


def test_pictures_of_pix2pix_show_input_result_and_target() -> None:
    task = task_with()
    (name, picture), *none = task.pictures().items()
    assert (name, none, picture.dtype) == ("test", [], torch.uint8)
    assert picture.shape == (3, 8 * 34 + 2, 3 * 34 + 2)
    assert torch.equal(picture[:, 2:34, 2:34], task.test_pairs[0, :3])
    assert torch.equal(picture[:, 2:34, 70:102], task.test_pairs[0, 3:])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"image_size": 40, "depth": 4}, "task.image_size=40 cannot be halved 4 times; type a multiple of 16"),
        ({"direction": "BtoC"}, "task.direction='BtoC' is not one of AtoB, BtoA"),
        ({"fid": "real"}, "task.fid='real' is not one of auto, inception, proxy"),
        ({"data": DataOptions("real")}, "data.root is not set; give the folder that holds facades/train and"),
        ({"data": DataOptions("rael")}, "data.source='rael' is not one of real, synthetic; did you mean 'real'?"),
    ],
)
def test_bad_options_of_pix2pix_are_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as error:
        task_with(**arguments)
    assert str(error.value).startswith(problem)


def test_the_real_facades_make_a_pix2pix_task(real_root: Path) -> None:
    data = DataOptions("real", str(real_root))
    limits = Limits(epochs=1, steps_per_epoch=2, test_samples=2)
    task = task_with(limits, data, image_size=64, test_folder="facades/val")
    assert task.train_batches.inputs.shape[1:] == (6, 72, 72)
    assert "training set: 150 pairs, the published one has 400" in task.marks
    task.train()
    for batch in task.train_batches.epoch(0):
        assert all(torch.isfinite(loss) for loss in task.train_step(batch).values())
    assert task.evaluate()["fid_proxy"] > 0


def test_a_pix2pix_run_ends_in_a_row_that_claims_no_fid_and_saves_its_pictures(tmp_path: Path) -> None:
    small = ("task.image_size=32", "task.depth=3", "task.width=4", "budget.steps_per_epoch=10")
    command = ("task=pix2pix", "order=quantize_first", "data=synthetic", "budget=smoke", *small)
    assert cli.main(["run", *command, f"results_dir={tmp_path}"]) == 0
    [row] = read_rows(tmp_path)[0]
    assert (row.metric, row.higher_is_better) == ("fid_proxy", False)
    assert row.density_paper == pytest.approx(1e12 / (row.score * (row.weight_bits_paper + row.feature_bits_paper)))
    assert [row.weight_sparsity, row.feature_sparsity] == pytest.approx([0.5, 0.5], abs=0.01)
    [picture] = tmp_path.rglob("pictures/*.png")
    with Image.open(picture) as image:
        assert image.size == (3 * 34 + 2, 8 * 34 + 2)
