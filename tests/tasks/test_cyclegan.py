from pathlib import Path
from typing import Any

import pytest
import torch

from qprune.errors import UserError
from qprune.tasks.cyclegan import CycleGAN
from qprune.training.task import DataOptions, Limits
from tests.tasks.adversarial_runs import prepared, recipe_of, train
from tests.training.toy import assert_same_state, killed

SYNTHETIC = DataOptions("synthetic")


def task_with(limits: Limits | None = None, data: DataOptions = SYNTHETIC, **arguments: Any) -> CycleGAN:
    limits = limits or Limits(epochs=4, steps_per_epoch=16, batch_size=32, test_samples=8)
    task = CycleGAN(data=data, limits=limits, seed=0, **{"image_size": 32, "width": 4, "blocks": 1} | arguments)
    task.optimizers()
    return task


def test_recipe_of_cyclegan_is_that_of_the_paper() -> None:
    task = task_with(Limits(epochs=300), image_size=None, width=None, blocks=9)
    assert sum(p.numel() for p in task.paper_network.parameters()) == 11_383_427
    assert (task.train_batches.batch_size, task.pool_a.size) == (1, 50)
    assert (task.cycle_weight, task.identity_weight) == (10, 0.5)
    assert (task.example.shape, task.train_batches.a.shape[1:]) == ((1, 3, 256, 256), (3, 286, 286))
    for optimizer in (task.generator_optimizer, task.judge_optimizer):
        assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (2e-4, (0.5, 0.999))
    assert task.marks == ["synthetic data"]


def test_translations_come_closer_to_the_other_domain() -> None:
    task = task_with(Limits(epochs=4, steps_per_epoch=24), width=8, learning_rate=1e-3)
    before = task.evaluate()["fid_proxy"]
    losses = train(task, 4)
    assert task.evaluate()["fid_proxy"] < 0.7 * before
    assert {*losses} == {"generators", "cycle", "identity", "judges"}
    assert not any(loss.requires_grad for loss in losses.values())


def test_weights_are_transformed_once_a_step_though_cyclegan_s_generator_is_called_three_times(tmp_path: Path) -> None:
    task, trainer = prepared(recipe_of("cyclegan", "order=quantize_first"), tmp_path)
    trainer.fit()
    task.train()
    [batch] = list(task.train_batches.epoch(0))[:1]
    calls = {"network": 0, "weight": 0}

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    task.network.register_forward_hook(count("network"))
    task.network.first.conv.parametrizations.weight[0].register_forward_hook(count("weight"))
    task.train_step(batch)
    assert calls == {"network": 3, "weight": 1}


def test_only_one_direction_of_cyclegan_is_compressed(tmp_path: Path) -> None:
    task, _ = prepared(recipe_of("cyclegan", "order=prune_first"), tmp_path)
    assert any("parametrizations" in name for name, _ in task.network.named_modules())
    for other in (task.back, task.judge_a, task.judge_b):
        assert not any("parametrizations" in name or "operators" in name for name, _ in other.named_modules())


def test_every_network_of_cyclegan_learns() -> None:
    task = task_with()
    networks = {"network": task.network, "back": task.back, "judge_a": task.judge_a, "judge_b": task.judge_b}
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}
    task.train()
    [batch] = list(task.train_batches.epoch(0))[:1]
    task.train_step(batch)
    for name, network in networks.items():
        changed = [not torch.equal(p, q) for p, q in zip(network.parameters(), before[name], strict=True)]
        # a bias in front of an instance norm has no effect and stays about where it is
        assert sum(changed) >= len(changed) / 2, name


def test_evaluation_of_cyclegan_changes_nothing() -> None:
    task = task_with(norm="batch")
    task.train()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    assert task.evaluate() == task.evaluate()
    assert all(module.training for module in task.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())


def test_pictures_of_cyclegan_show_what_was_translated() -> None:
    task = task_with()
    picture = task.pictures()["test"]
    assert picture.shape == (3, 4 * 34 + 2, 4 * 34 + 2)
    assert torch.equal(picture[:, 2:34, 2:34], task.test_a[0])
    assert torch.equal(picture[:, 2:34, 70:102], task.test_a[1])


# while pruning, with quantized weights, and at the step that quantizes features
@pytest.mark.parametrize("task", ["pix2pix", "cyclegan"])
@pytest.mark.parametrize(("order", "steps"), [("prune_first", (16, 38)), ("quantize_first", (16,))])
def test_a_resumed_translation_equals_an_uninterrupted_one(
    task: str, order: str, steps: tuple[int, ...], tmp_path: Path
) -> None:
    recipe = recipe_of(task, f"order={order}")
    whole, trainer = prepared(recipe, tmp_path / "whole", checkpoint_minutes=5.0)
    expected = trainer.fit()
    assert task == "pix2pix" or len(whole.memory()["pool_a"]) == 2  # full: pictures were exchanged
    for step in steps:
        folder = tmp_path / str(step)
        killed(prepared(recipe, folder)[1], step)
        resumed, trainer = prepared(recipe, folder, checkpoint_minutes=5.0)
        assert trainer.fit() == expected
        assert_same_state(resumed, whole)
        assert (folder / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"image_size": 30}, "task.image_size=30 cannot be halved twice; type a multiple of 4"),
        ({"norm": "layer"}, "task.norm='layer' is not one of instance, batch"),
        ({"fid": "real"}, "task.fid='real' is not one of auto, inception, proxy"),
        ({"data": DataOptions("real")}, "data.root is not set; give the folder that holds horse2zebra, or type data="),
        ({"data": DataOptions("rael")}, "data.source='rael' is not one of real, synthetic; did you mean 'real'?"),
    ],
)
def test_bad_options_of_cyclegan_are_named(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError) as error:
        task_with(**arguments)
    assert str(error.value).startswith(problem)


def test_the_real_horses_and_zebras_make_a_cyclegan_task(real_root: Path) -> None:
    limits = Limits(epochs=1, steps_per_epoch=2, test_samples=2)
    task = task_with(limits, DataOptions("real", str(real_root)))
    assert "trainA: 120 pictures, the published set has 1067" in task.marks
    task.train()
    for batch in task.train_batches.epoch(0):
        assert all(torch.isfinite(loss) for loss in task.train_step(batch).values())
    assert task.evaluate()["fid_proxy"] > 0
