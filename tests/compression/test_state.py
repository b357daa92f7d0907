"""What a network does belongs to its state: loaded, copied, moved and averaged networks; float checkpoints."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import qprune
from qprune.compression.compressor import Compressor
from qprune.compression.quantizer import Quantizer
from tests.compression.test_convert import converted, mobilenet, pictures, train, transformer

NETWORKS = pytest.mark.parametrize("make", [mobilenet, transformer])
Make = Callable[[], Compressor]


def through_a_file(state: dict[str, Tensor]) -> Any:
    content = io.BytesIO()
    torch.save(state, content)
    content.seek(0)
    return torch.load(content, weights_only=True)


def loaded(make: Make, network: nn.Module, assign: bool) -> nn.Module:
    fresh = make().network
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(through_a_file(network.state_dict()), assign=assign)
    return fresh


WAYS: dict[str, Callable[[Make, nn.Module], nn.Module]] = {
    "loaded": lambda make, network: loaded(make, network, assign=False),
    "assigned": lambda make, network: loaded(make, network, assign=True),
    "copied": lambda _, network: copy.deepcopy(network),
    "a copy of a loaded one": lambda make, network: copy.deepcopy(loaded(make, network, assign=False)),
    "loaded into a copy": lambda make, network: _into_a_copy(make, network),
    "moved": lambda _, network: copy.deepcopy(network).double().float(),
}


def _into_a_copy(make: Make, network: nn.Module) -> nn.Module:
    copied = copy.deepcopy(make().network)
    copied.load_state_dict(network.state_dict())
    return copied


@NETWORKS
@pytest.mark.parametrize("way", WAYS)
def test_a_network_does_what_the_saved_one_did(make: Make, way: str) -> None:
    network = converted(make)[1]
    again = WAYS[way](make, network).eval()
    assert torch.equal(again(pictures(5)), network(pictures(5)))
    assert torch.equal(qprune.convert(again)(pictures(5)), network(pictures(5)))


@NETWORKS
@pytest.mark.parametrize("way", WAYS)
def test_a_network_from_before_the_first_event_is_the_float_one(make: Make, way: str) -> None:
    network = make().network.eval()
    plain = qprune.convert(network)
    assert not [name for name, _ in plain.named_modules() if name.endswith("_operators")]
    assert torch.equal(WAYS[way](make, network).eval()(pictures(5)), plain(pictures(5)))


class TimmV2:
    """As timm's ModelEmaV2: everything in the state is averaged, integers by truncation."""

    def __init__(self, network: nn.Module) -> None:
        self.module = copy.deepcopy(network).eval()

    @torch.no_grad()
    def update_parameters(self, network: nn.Module) -> None:
        for ours, theirs in zip(self.module.state_dict().values(), network.state_dict().values(), strict=True):
            ours.copy_(0.9 * ours + 0.1 * theirs)


class TimmV3(TimmV2):
    """As timm's ModelEmaV3: floats are averaged, integers copied."""

    @torch.no_grad()
    def update_parameters(self, network: nn.Module) -> None:
        for ours, theirs in zip(self.module.state_dict().values(), network.state_dict().values(), strict=True):
            ours.lerp_(theirs, 0.1) if ours.is_floating_point() else ours.copy_(theirs)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "SWA": AveragedModel,
    "EMA": lambda network: AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "EMA with buffers, as torchvision's": lambda n: AveragedModel(n, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    "timm's V2": TimmV2,
    "timm's V3": TimmV3,
}


def averaged(make: Make, kind: str) -> tuple[Compressor, nn.Module]:
    """A trained network, and the average of its training, begun at step 0."""
    compressor = make()
    average = AVERAGES[kind](compressor.network)
    optimizer = torch.optim.SGD(compressor.network.parameters(), lr=1e-3)
    for step in range(12):
        compressor.at(step)
        compressor.network.train()
        optimizer.zero_grad()
        compressor.network(pictures(4, seed=step)).square().mean().backward()
        optimizer.step()
        average.update_parameters(compressor.network)
    return compressor, average.module.eval()


@NETWORKS
@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_begun_at_step_0_has_the_masks_and_grids_of_the_end(make: Make, kind: str) -> None:
    compressor, average = averaged(make, kind)
    plain, ours = qprune.convert(average), dict(compressor.convert().named_buffers())
    constants = {name: value for name, value in plain.named_buffers() if "_operators." in name}
    assert {name.rpartition(".")[2] for name in constants} == {"mask", "decimal"}
    for name, value in constants.items():
        assert torch.equal(value, ours[name]), name
    for placed in compressor.quantizers("weight"):
        assert isinstance(placed.operator, Quantizer)
        weight = plain.get_parameter(f"{placed.path}.weight" if "in_proj" not in placed.path else placed.path)
        axis = placed.operator.axis
        shape = [-1 if dim == axis else 1 for dim in range(weight.dim())]
        scaled = weight * 2.0 ** placed.operator.fraction_bits.view(shape if axis is not None else ())
        assert torch.equal(scaled, scaled.round()), placed.path
    zeros = [float((plain.get_parameter(name) == 0).float().mean()) for name in _pruned(compressor)]
    assert min(zeros) >= 0.49
    assert torch.equal(average(pictures(5)), plain(pictures(5)))


def _pruned(compressor: Compressor) -> list[str]:
    return [p.path if "in_proj" in p.path else f"{p.path}.weight" for p in compressor.pruners("weight")]


@NETWORKS
def test_an_average_is_swapped_in_for_evaluation(make: Make) -> None:
    """As Lightning's WeightAveraging does, buffers included; and loaded into the network for good."""
    compressor, average = averaged(make, "EMA with buffers, as torchvision's")
    expected, network = average(pictures(5)), compressor.network.eval()
    kept = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(network.state_dict().values(), average.state_dict().values(), strict=True):
            ours.copy_(theirs)
    assert torch.equal(network(pictures(5)), expected)
    assert torch.equal(compressor.convert()(pictures(5)), expected)
    network.load_state_dict(kept)
    assert not torch.equal(network(pictures(5)), expected)
    network.load_state_dict(average.state_dict())
    assert torch.equal(network(pictures(5)), expected)


def test_averaged_parameters_in_a_copy_of_the_trained_network() -> None:
    compressor = mobilenet()
    train(compressor.network, compressor, pictures(4))
    copied = copy.deepcopy(compressor.network).eval()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.75)
    zeros = float((copied.features[1].conv[0][0].weight == 0).float().mean())
    assert zeros >= 0.5
    assert torch.equal(qprune.convert(copied)(pictures(5)), copied(pictures(5)))


def float_run() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 2, 1))
    return network, torch.optim.Adam(network.parameters(), lr=0.01)


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, count: int, compressor: Any = None) -> None:
    for step in range(count):
        if compressor:
            compressor.at(step)
        optimizer.zero_grad()
        network.train()(pictures(4, seed=step)).square().mean().backward()
        optimizer.step()


def compressed(network: nn.Module) -> Compressor:
    return qprune.compress(network, pictures(4), qprune.Schedule(t_p=0, dt_p=1, n=2, t_qw=3, t_qf=4), 1, 4)


def test_a_float_run_goes_on_compressed_with_its_optimizer() -> None:
    """Load both states before `compress`, which changes neither the parameters nor what the optimizer holds."""
    network, optimizer = float_run()
    steps(network, optimizer, 3)
    saved = through_a_file(network.state_dict()), through_a_file(optimizer.state_dict())
    steps(network, optimizer, 6, compressed(network))

    again, its_optimizer = float_run()
    again.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    compressor = compressed(again)
    assert [*map(id, its_optimizer.param_groups[0]["params"])] == [*map(id, _in_old_order(again))]
    steps(again, its_optimizer, 6, compressor)
    for (name, expected), found in zip(network.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def _in_old_order(network: nn.Module) -> list[nn.Parameter]:
    plain = float_run()[0]
    found = {
        name.replace(".parametrizations", "").removesuffix(".original"): p for name, p in network.named_parameters()
    }
    return [found[name] for name, _ in plain.named_parameters()]


def test_states_of_version_0_1_are_read() -> None:
    """Their events and fraction bits are integers, and their windows buffers."""
    compressor = mobilenet()
    train(compressor.network, compressor, pictures(4))
    network = compressor.network.eval()
    old = {
        name: value.int() if name.endswith((".updates", ".decimal")) else value
        for name, value in network.state_dict().items()
    }
    old |= {name.replace(".updates", ".kept"): torch.empty(0) for name in old if ".quantizer.updates" in name}
    again = mobilenet().network
    again.load_state_dict(old)
    assert torch.equal(again.eval()(pictures(5)), network(pictures(5)))
