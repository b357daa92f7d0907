import math

import pytest
import torch
from torch import nn
from torchvision.transforms.v2 import functional as reference

from qprune.errors import UserError
from qprune.tasks.cifar import MEAN, STD, Cifar
from qprune.training.task import DataOptions, Limits
from tests.tasks.adversarial_runs import train

SYNTHETIC = DataOptions(source="synthetic")
SMOKE = Limits(epochs=4, steps_per_epoch=16, batch_size=32, test_samples=64)


@pytest.fixture(scope="module")
def paper() -> Cifar:
    task = Cifar(data=SYNTHETIC, limits=Limits(epochs=250), seed=0)
    task.optimizers()
    return task


def tiny_network() -> nn.Module:
    def layer(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, out, 5, stride=2, bias=False), nn.BatchNorm2d(out), nn.ReLU())

    return nn.Sequential(layer(3, 24), layer(24, 48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def test_recipe_is_that_of_the_paper(paper: Cifar) -> None:
    assert (paper.train_batches.batch_size, paper.initial_rate) == (128, 0.1)
    (group,) = paper.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 5e-4)
    assert len(group["params"]) == len(list(paper.network.parameters()))
    assert sum(p.numel() for p in paper.network.parameters()) == 2_296_922


def test_xavier_initialization_is_uniform_within_its_bounds(paper: Cifar) -> None:
    """Glorot and Bengio 2010: U(-a, a) with a = sqrt(6 / (fan_in + fan_out))."""
    network = Cifar(data=SYNTHETIC, limits=SMOKE, seed=0, initialization="xavier").network
    for layer, fans in ((network.conv2, 320 + 1280), (network.conv1, 9 * (3 + 32)), (network.linear, 1280 + 10)):
        bound = math.sqrt(6 / fans)
        weight = layer.weight.detach()
        assert float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not network.linear.bias.any()
    default = Cifar(data=SYNTHETIC, limits=SMOKE, seed=0).network
    assert all(map(torch.equal, default.parameters(), paper.network.parameters()))


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.1), (125, 0.05), (250 / 3, 0.075), (249, 3.9478e-6)])
def test_learning_rate_is_half_a_cosine(paper: Cifar, epoch: int, rate: float) -> None:
    paper.begin_epoch(epoch)
    assert paper.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-4)


def test_learning_rate_equals_the_scheduler_of_torch() -> None:
    task = Cifar(data=SYNTHETIC, limits=Limits(epochs=10), seed=0)
    optimizer = torch.optim.SGD(task.network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for epoch in range(10):
        assert task.learning_rate(epoch) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_normalisation_equals_that_of_torchvision(paper: Cifar) -> None:
    pictures = paper.test_images[:4]
    expected = reference.normalize(pictures.float() / 255, list(MEAN), list(STD))
    assert torch.equal(paper.normalised(pictures), expected)


def test_limits_leave_marks_and_scale_the_learning_rate() -> None:
    task = Cifar(data=SYNTHETIC, limits=SMOKE, seed=0)
    assert task.marks == [
        "synthetic data",
        "batch size: 32 instead of 128",
        "training set: 512 of 5120",
        "test set: 64 of 1000",
    ]
    assert (len(task.train_batches), task.train_batches.samples, len(task.test_labels)) == (16, 512, 64)
    assert task.initial_rate == pytest.approx(0.025)


def test_the_same_seed_makes_the_same_task_whatever_was_drawn_before() -> None:
    def weight(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)
        network: nn.Module = Cifar(data=SYNTHETIC, limits=SMOKE, seed=seed).network
        return network.get_parameter("conv1.weight")

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))


def test_data_and_examples_move_with_the_task_and_stay_out_of_its_state(paper: Cifar) -> None:
    assert all(name.startswith("network.") for name in paper.state_dict())
    moved = Cifar(data=SYNTHETIC, limits=SMOKE, seed=0).to("meta")
    tensors = (moved.train_batches.inputs, moved.test_images, moved.example, moved.size_example)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_network_learns_the_synthetic_set_within_sixty_steps() -> None:
    torch.manual_seed(0)
    task = Cifar(data=SYNTHETIC, limits=Limits(4, steps_per_epoch=15, batch_size=32, test_samples=500), seed=0)
    task.network = tiny_network()  # the full one takes a minute
    task.optimizers()
    untrained = task.evaluate()["top1_percent"]
    losses = train(task, 4)
    assert losses["loss"].shape == ()
    assert not losses["loss"].requires_grad
    assert untrained < 25
    assert task.evaluate()["top1_percent"] > 50


def test_evaluation_counts_right_answers_in_eval_mode_and_changes_nothing() -> None:
    limits = Limits(epochs=1, steps_per_epoch=1, batch_size=2, test_samples=30)
    task = Cifar(data=SYNTHETIC, limits=limits, seed=0, eval_batch_size=12)
    task.train()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    metrics = task.evaluate()
    assert task.network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
    task.network.eval()
    with torch.no_grad():
        logits = task.network(task.normalised(task.test_images))
    right = (logits.argmax(1) == task.test_labels).sum().item()
    assert metrics["top1_percent"] == pytest.approx(100 * right / 30)
    assert metrics["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, task.test_labels).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (DataOptions("rael"), r"data.source='rael' is not one of real, synthetic; did you mean 'real'\?"),
        (DataOptions("real", root=None), "data.root is not set; give the folder that holds cifar-10-batches-py"),
    ],
)
def test_bad_data_options_are_named(data: DataOptions, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Cifar(data=data, limits=SMOKE, seed=0)


def test_pictures_kept_apart_are_scored_and_not_trained_on() -> None:
    limits = Limits(epochs=1)
    whole = Cifar(data=SYNTHETIC, limits=limits, seed=0)
    task = Cifar(data=DataOptions(source="synthetic", validation=0.1), limits=limits, seed=0)
    assert task.marks == ["synthetic data", "512 of 5120 training pictures kept apart for choices"]
    assert (task.train_batches.samples, len(task.validation_labels)) == (4608, 512)
    trained = {picture.numpy().tobytes() for picture in task.train_batches.inputs}
    apart = {picture.numpy().tobytes() for picture in task.validation_images}
    assert not trained & apart
    assert trained | apart == {picture.numpy().tobytes() for picture in whole.train_batches.inputs}
    for each in (whole, task):
        each.network = tiny_network()
    torch.manual_seed(0)
    state = tiny_network().state_dict()
    for each in (whole, task):
        each.network.load_state_dict(state)
    found = task.evaluate()
    assert list(found) == ["top1_percent", "test_loss", "validation_top1_percent", "validation_loss"]
    assert {name: found[name] for name in ("top1_percent", "test_loss")} == whole.evaluate()
