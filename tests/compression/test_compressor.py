"""Attached networks: events, equality after baking, state, compilation, and every way of getting it wrong."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

import qprune
from qprune.compression.compressor import Compressor, attach, compress
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.plan import Plan, Site
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer
from qprune.compression.schedule import Schedule
from qprune.errors import RunFailure, UserError

PRUNE_FIRST = Schedule(t_p=0, dt_p=1, n=4, t_qw=5, t_qf=6)
QUANTIZE_FIRST = Schedule(t_qw=1, t_qf=2, t_p=2, dt_p=1, n=4)
STEPS = 8


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
        nn.Tanh(),
        nn.Conv2d(8, 4, 1),
    )


def batch(step: int, size: int = 4) -> Tensor:
    return torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(100 + step))


def train(net: nn.Module, compressor: Compressor, steps: range, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in steps:
        compressor.at(step)
        net.train()
        optimizer.zero_grad()
        net(batch(step)).square().mean().backward()
        optimizer.step()


def trained(schedule: Schedule = PRUNE_FIRST, **options: object) -> tuple[nn.Module, Compressor]:
    net = network()
    quantization = QuantizeConfig(**options)  # type: ignore[arg-type]
    compressor = compress(net, batch(0), schedule, 1, 4, PruneConfig(window=8), quantization)
    train(net, compressor, range(STEPS))
    return net, compressor


@pytest.mark.parametrize("schedule", [PRUNE_FIRST, QUANTIZE_FIRST])
@pytest.mark.parametrize("axis", ["authors", "tensor", "output"])
def test_converted_equals_attached_to_the_last_bit(schedule: Schedule, axis: str) -> None:
    net, compressor = trained(schedule, weight_axis=axis)
    net.eval()
    converted = compressor.convert()
    x = batch(99, 7)
    assert torch.equal(converted(x), net(x))
    assert type(converted[0]) is nn.Conv2d
    assert type(net[0]) is not nn.Conv2d
    assert [name for name, _ in converted.named_parameters()] == [name for name, _ in network().named_parameters()]
    assert compressor.sparsity == {"weight": 0.5, "feature": 0.5}
    assert float((converted[3][0].weight == 0).float().mean()) >= 0.5
    buffer = io.BytesIO()
    torch.save(converted, buffer)  # an ordinary module: it pickles
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), net(x))


def test_events_fire_when_the_schedule_says() -> None:
    net = network()
    compressor = compress(net, batch(0), PRUNE_FIRST, 1, 4, PruneConfig(window=8), QuantizeConfig())
    seen = []
    for step in range(STEPS):
        train(net, compressor, range(step, step + 1))
        quantized = tuple(all(p.operator.active for p in compressor.quantizers(kind)) for kind in ("weight", "feature"))
        seen.append((round(compressor.sparsity["weight"], 4), *quantized))
    # 8*8*9 = 576 weights: floor(576 * 0.5 * (1 - (1 - k/4)^3)) / 576
    assert [s for s, *_ in seen] == [0, 0.2882, 0.4375, 0.4913, 0.5, 0.5, 0.5, 0.5]
    assert [w for _, w, _ in seen] == [False] * 5 + [True] * 3
    assert [f for *_, f in seen] == [False] * 6 + [True] * 2


def test_feature_masks_come_from_the_operators_input_of_the_window() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 1), Pruner(0.5), nn.Conv2d(5, 2, 1))
    compressor = Compressor(net, Schedule(t_p=2, dt_p=1, n=1).in_steps(1, 4, window=6), batch(0))
    outputs = []
    for step in range(4):
        compressor.at(step)
        outputs.append(net[0](batch(step)).detach())
        net(batch(step))
    window = torch.cat([outputs[1][:2], outputs[2]]).double().abs().sum(0)
    assert torch.equal(net[1].mask.bool(), qprune.magnitude_mask(window, 0.5))


def test_hand_placed_operators_are_driven_too() -> None:
    net = nn.Sequential(
        Quantizer(8).on(Pruner(0.5).on(nn.Conv2d(3, 4, 3))), Pruner(0.25), Quantizer(8), nn.ReLU(), nn.Conv2d(4, 1, 1)
    )
    compressor = Compressor(net, PRUNE_FIRST.in_steps(1, 4), batch(0))
    train(net, compressor, range(STEPS))
    assert [(p.path, p.kind, type(p.operator)) for p in compressor.placed] == [
        ("0", "weight", Pruner),
        ("0", "weight", Quantizer),
        ("1", "feature", Pruner),
        ("2", "feature", Quantizer),
    ]
    assert compressor.sparsity == {"weight": 0.5, "feature": 0.25}
    net.eval()
    assert torch.equal(compressor.convert()(batch(5)), net(batch(5)))


def test_state_goes_through_a_state_dict() -> None:
    net, compressor = trained()
    fresh = network(seed=1)
    again = compress(fresh, batch(0), PRUNE_FIRST, 1, 4, PruneConfig(window=8), QuantizeConfig())
    fresh.load_state_dict(net.state_dict())
    again.at(STEPS)
    net.eval(), fresh.eval()
    assert torch.equal(fresh(batch(50)), net(batch(50)))
    assert (again.describe(), again.sparsity) == (compressor.describe(), compressor.sparsity)


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_resumed_equals_uninterrupted(stop: int) -> None:
    expected, _ = trained()
    first = network()
    compressor = compress(first, batch(0), PRUNE_FIRST, 1, 4, PruneConfig(window=8), QuantizeConfig())
    optimizer = torch.optim.SGD(first.parameters(), lr=0.05, momentum=0.9)
    train(first, compressor, range(stop), optimizer)
    second = network(seed=1)
    resumed = compress(second, batch(0), PRUNE_FIRST, 1, 4, PruneConfig(window=8), QuantizeConfig())
    other = torch.optim.SGD(second.parameters(), lr=0.05, momentum=0.9)
    for new, old in ((second, first), (resumed, compressor), (other, optimizer)):
        new.load_state_dict(old.state_dict())
    train(second, resumed, range(stop, STEPS), other)
    for (name, a), b in zip(expected.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_deepcopies_are_independent() -> None:
    net, compressor = trained()
    net.eval()
    copied = copy.deepcopy(net)
    before = copied(batch(3))
    assert torch.equal(before, net(batch(3)))
    for placed in compressor.placed:
        placed.operator.active = False
    assert torch.equal(copied(batch(3)), before)
    assert not torch.equal(net(batch(3)), before)


@pytest.mark.parametrize("training", [False, True])
def test_compiled_without_graph_breaks_gives_the_same(training: bool) -> None:
    net, compressor = trained()
    net.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = batch(7)
    expected = copy.deepcopy(net)(x)
    assert torch.equal(compiled(x), expected)
    if training:  # observing is part of the graph too
        for placed in compressor.pruners("feature") + compressor.quantizers("feature"):
            placed.operator.observing = True
            placed.operator.start_window()  # type: ignore[operator]
        compiled(x)
        assert all(p.operator.window.sum() > 0 for p in compressor.pruners("feature"))


def test_a_window_takes_memory_until_its_event_alone() -> None:
    net = network()
    compressor = compress(net, batch(0), PRUNE_FIRST, 1, 4)
    last = compressor.timeline.prune_steps[-1]
    pruners = [placed.operator for placed in compressor.pruners("feature")]
    sizes = {name: buffer.shape for name, buffer in net.named_buffers()}
    train(net, compressor, range(last))
    assert all(p.window.shape == p.mask.shape for p in pruners)
    train(net, compressor, range(last, last + 1))
    assert all(p.window is None for p in pruners)
    assert {name: buffer.shape for name, buffer in net.named_buffers()} == sizes


def test_steps_that_go_back_and_windows_without_their_beginning_are_refused() -> None:
    net, compressor = trained()
    with pytest.raises(UserError, match=r"at\(2\) after at\(7\): pass the optimizer step since training began"):
        compressor.at(2)
    fresh = network()
    resumed = compress(fresh, batch(0), PRUNE_FIRST, 1, 4, PruneConfig(window=16), QuantizeConfig())
    fresh.load_state_dict(net.state_dict())
    with pytest.raises(UserError, match="step 5 lies inside a window of observations.*compressor's state too"):
        resumed.at(5)


def test_training_in_evaluation_mode_is_refused_at_the_first_event() -> None:
    net = network().eval()
    compressor = compress(net, batch(0), PRUNE_FIRST, 1, 4)
    compressor.at(0)
    net(batch(0))
    with pytest.raises(UserError, match="not observed before the event of step 1; the network is in evaluation mode"):
        compressor.at(1)


def test_the_last_event_may_fire_again_when_the_state_of_its_step_is_loaded() -> None:
    net = network()
    compressor = compress(net, batch(0), PRUNE_FIRST, 1, 4)
    last = compressor.timeline.prune_steps[-1]
    train(net, compressor, range(last))
    compressor.at(last)
    saved, windows = copy.deepcopy(net.state_dict()), compressor.state_dict()
    again = network()
    resumed = compress(again, batch(0), PRUNE_FIRST, 1, 4)
    again.load_state_dict(saved)
    resumed.load_state_dict(windows)
    for each, used in ((net, compressor), (again, resumed)):
        train(each, used, range(last, STEPS))
    assert compressor.sparsity == resumed.sparsity
    assert torch.equal(net.eval()(batch(99)), again.eval()(batch(99)))


def test_evaluation_inside_a_window_changes_nothing() -> None:
    net = network()
    compressor = compress(net, batch(0), PRUNE_FIRST, 1, 4, PruneConfig(window=8), QuantizeConfig())
    train(net, compressor, range(3))
    before = copy.deepcopy(net.state_dict())
    net.eval()
    net(batch(60))
    with compressor.evaluating():
        net.train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        net(batch(61))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_jumping_over_an_event_is_refused() -> None:
    net = network()
    compressor = compress(net, batch(0), PRUNE_FIRST, 1, 4, PruneConfig(window=8), QuantizeConfig())
    with pytest.raises(UserError, match=r"at\(7\) jumps over the event of step 1: call at\(step\) before every step"):
        compressor.at(7)
    train(net, compressor, range(1))
    with pytest.raises(UserError, match="jumps over the event of step 1"):
        compressor.at(2)


def test_an_operator_of_two_calls_observes_both() -> None:
    relu = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(3, 3, 1), relu, nn.Conv2d(3, 3, 1), relu)
    plan = Plan((Site("1", "feature", prune=True, quantize=True),))
    compressor = attach(net, plan, PRUNE_FIRST.in_steps(1), batch(0), PruneConfig(), QuantizeConfig())
    assert compressor.calls == {"1": 2}
    compressor.at(0)
    made: list[Tensor] = []
    for layer in (net[0], net[2]):
        layer.register_forward_hook(lambda _m, _a, out: made.append(out.detach().relu()))
    net(batch(0))
    [pruner], both = [p.operator for p in compressor.pruners("feature")], torch.cat(made).double()
    assert torch.equal(pruner.window, both.abs().sum(0))
    assert str(compressor).endswith("one set of decimals and one mask for all calls: 1 (2 calls)")


def test_two_sites_at_one_tensor_are_refused() -> None:
    plan = Plan((Site("3", "feature", prune=True), Site("3.1", "feature", prune=True)))
    with pytest.raises(UserError, match=r"^3.1: this is the same tensor as that of another site of the plan"):
        attach(network(), plan, PRUNE_FIRST.in_steps(1), batch(0), PruneConfig())


def test_features_cannot_be_quantized_before_any_was_seen() -> None:
    with pytest.raises(UserError, match="t_qf is at step 0, before any feature was seen"):
        compress(network(), batch(0), Schedule(t_qw=0, t_qf=0), 1, 4, None, QuantizeConfig())
    net = network()
    compressor = compress(net, batch(0), Schedule(t_qw=0, t_qf=0), 1, 4, None, QuantizeConfig(decimal=5))
    train(net, compressor, range(2))  # fixed decimal bits need no window: Q_u(x, d) of Table 1
    assert all(p.operator.active for p in compressor.placed)


def test_values_that_are_not_finite_stop_the_event_and_name_the_place() -> None:
    net = network()
    compressor = compress(net, batch(0), PRUNE_FIRST, 1, 4, PruneConfig(window=8), QuantizeConfig())
    train(net, compressor, range(1))
    with torch.no_grad():
        net[3][0].parametrizations.weight.original[0, 0, 0, 0] = math.nan
    with pytest.raises(RunFailure, match="the weight of '3.0' has values that are not finite at its pruner's event"):
        compressor.at(1)
