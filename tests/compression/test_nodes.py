"""The operators in C++ against the functions in Python: the same bits, the same graph for all who look at it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qprune.compression import functional, nodes
from qprune.compression import native as kernels
from qprune.compression.compressor import attach
from qprune.compression.config import Pruning, Quantization
from qprune.compression.fake_quantize import quantize_checked
from qprune.compression.plan import Plan
from qprune.compression.rectified import find_rectified
from qprune.compression.schedule import Timeline
from qprune.training.compile import as_written
from tests.compression.test_native import LAYOUTS, SHAPES, same_bits, sample

BOUNDS = (-128, 127)
D = torch.tensor(4, dtype=torch.int32)


@pytest.fixture(scope="module")
def used(built_nodes: Path) -> tuple[Any, Any]:
    """Kernels, and the function that makes nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_library", None)
        kernels.load()
        return kernels.library(), nodes.loaded(built_nodes)


@pytest.fixture(autouse=True)
def _in_use(used: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library", used[0])
    monkeypatch.setattr(nodes, "_operate", used[1])


def without(function: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The same by the functions in Python, which the kernels serve too."""
    operate, nodes._operate = nodes._operate, None
    try:
        return function()
    finally:
        nodes._operate = operate


def is_node(x: Tensor) -> bool:
    assert x.grad_fn is not None
    return "Operate" in x.grad_fn.name()


def quantized(
    x: Tensor, mask: Tensor | None = None, rounding: str = "trunc", in_place: bool = False, rectify: bool = False
) -> Tensor:
    return quantize_checked(x, BOUNDS, D, rounding, "clip_value", None, mask, in_place, True, rectify)


def both(
    made_from: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor, node: bool = True, layouts: bool = True
) -> None:
    """Check that result and gradient are the same bits, in the same layout, with nodes and without them."""

    def found() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = made_from(leaf * 1.0)
        assert is_node(out) == (node and nodes._operate is not None)
        given = upstream.clone()
        out.backward(upstream)
        assert torch.equal(upstream.nan_to_num(), given.nan_to_num())  # it is the caller's
        assert leaf.grad is not None
        return [out.detach(), leaf.grad]

    for a, b in zip(found(), without(found), strict=True):
        assert same_bits(a, b) if layouts else torch.equal(a, b)


def mask_for(x: Tensor) -> Tensor:
    return (torch.rand_like(x[0], memory_format=torch.preserve_format) > 0.5).float()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_features(shape: tuple[int, ...], layout: torch.memory_format, with_mask: bool, in_place: bool) -> None:
    x, upstream = sample(shape, 1, layout), sample(shape, 2, layout)
    mask = mask_for(x) if with_mask else None
    for rounding in functional.ROUNDINGS:
        both(lambda y: quantized(y, mask, rounding, in_place), x, upstream)  # noqa: B023
        both(lambda y: quantized(y, mask, rounding, in_place, rectify=True), x, upstream)  # noqa: B023
    if mask is not None:
        both(lambda y: functional.prune(y, mask, in_place), x, upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("with_mask", [False, True])
def test_weights_with_decimals_of_their_own(axis: int, layout: torch.memory_format, with_mask: bool) -> None:
    x, upstream = sample((6, 8, 3, 5), 3, layout), sample((6, 8, 3, 5), 4, layout)
    mask = (torch.rand_like(x) > 0.5).float() if with_mask else None
    d = torch.arange(x.shape[axis], dtype=torch.int32) % 12 - 3
    both(lambda y: functional.quantize(y, 8, d, axis=axis, mask=mask), x, upstream)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("upstream", ["of another layout", "one number", "of a slice"])
def test_gradients_that_lie_otherwise(upstream: str, with_mask: bool) -> None:
    x = torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)
    mask = mask_for(x) if with_mask else None
    grads = {
        "of another layout": 20 * torch.randn(4, 6, 5, 5),
        "one number": torch.full((1, 1, 1, 1), 30.0).expand(4, 6, 5, 5),
        "of a slice": 20 * torch.randn(4, 12, 5, 5)[:, ::2],
    }
    for rectify in (False, True):
        both(lambda y: quantized(y, mask, rectify=rectify), x, grads[upstream], layouts=False)  # noqa: B023


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_tanh_that_nobody_else_reads_is_part_of_the_pass(layout: torch.memory_format, with_mask: bool) -> None:
    x, upstream = (
        torch.randn(3, 6, 7, 5).to(memory_format=layout),
        30 * torch.randn(3, 6, 7, 5).to(memory_format=layout),
    )
    mask = mask_for(x) if with_mask else None

    def behind(y: Tensor) -> Tensor:
        rest = None, mask, False, True, False
        return quantize_checked(y.tanh(), BOUNDS, D, "trunc", "clip_value", *rest, sole_reader=True)

    both(behind, x, upstream)
    front = (x.clone().requires_grad_() * 1.0).tanh()
    out = quantize_checked(front, BOUNDS, D, "trunc", "clip_value", None, mask, False, sole_reader=True)
    assert [each[0].name() for each in out.grad_fn.next_functions if each[0]] == ["MulBackward0"]  # type: ignore[union-attr]


def test_a_tanh_whose_gradient_somebody_waits_for_is_not_passed_over() -> None:
    def seen(watch: Callable[[Tensor], object]) -> str:
        front = (torch.randn(3, 4, requires_grad=True) * 1.0).tanh()
        watch(front)
        out = quantize_checked(front, BOUNDS, D, "trunc", "clip_value", None, None, False, sole_reader=True)
        return str(out.grad_fn.next_functions[0][0].name())  # type: ignore[union-attr]

    assert seen(lambda x: None) == "MulBackward0"
    assert seen(lambda x: x.register_hook(lambda grad: grad)) == "TanhBackward0"
    assert seen(lambda x: x.retain_grad()) == "TanhBackward0"
    assert seen(lambda x: x.grad_fn.register_prehook(lambda grads: grads)) == "TanhBackward0"  # type: ignore[union-attr]
    assert seen(lambda x: x.grad_fn.register_hook(lambda a, b: a)) == "TanhBackward0"  # type: ignore[union-attr]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.tanh = nn.Conv2d(8, 6, 3), nn.Tanh()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.linear(self.tanh(self.conv2(x)).mean((2, 3)))
        return out


@pytest.mark.parametrize("packed", [False, True])
def test_training_has_the_same_bits(packed: bool) -> None:
    torch.manual_seed(0)
    fresh = _Net().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 10, 10).to(memory_format=torch.channels_last)
    target = torch.randint(0, 4, (8,))

    def trained() -> list[Tensor]:
        network = copy.deepcopy(fresh)
        plan = Plan.from_globs(
            network,
            quantize_weights=["**"],
            prune_weights=["conv2"],
            quantize_features=["bn1", "tanh", "linear"],
            prune_features=["bn1", "conv2"],
        )
        times = Timeline((2, 4), 6, 8, window=16, steps_per_epoch=100, batch_size=8, last_batch_size=8)
        compressor = attach(network, plan, times, x[:1], Pruning(window=16), Quantization())
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        rectified = find_rectified(network, x[:1])
        assert [operators.site for operators in rectified] == ["bn1"]
        losses = []
        network.train()
        for step in range(14):
            compressor.at(step)
            active = rectified if step >= 8 else []
            optimizer.zero_grad()
            with as_written(active, packed):
                loss = F.cross_entropy(network(x), target)
                loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *network.state_dict().values()]

    found = trained()
    assert len({float(loss) for loss in found[:14]}) == 14  # it trains
    for a, b in zip(found, without(trained), strict=True):
        assert torch.equal(a, b)


def test_a_tanh_module_that_others_listen_to_keeps_its_own_gradient() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())
    plan = Plan.from_globs(network, quantize_features=["1"])
    x = torch.randn(2, 3, 6, 6)
    times = Timeline(feature_step=1, window=2, steps_per_epoch=5, batch_size=2, last_batch_size=2)
    compressor = attach(network, plan, times, x, None, Quantization(targets="f"))
    for step in range(2):
        compressor.at(step)
        network(x)
    network.train()
    assert [f[0].name() for f in network(x).grad_fn.next_functions if f[0]] == ["ConvolutionBackward0"]
    kept = []
    network[1].register_forward_hook(lambda module, args, output: kept.append(output))
    assert [f[0].name() for f in network(x).grad_fn.next_functions if f[0]] == ["TanhBackward0"]


def test_a_gradient_that_nobody_else_holds_is_worked_in() -> None:
    mask = torch.zeros(4)

    def new_tensors(watch: Callable[[Tensor], object]) -> int:
        x = torch.randn(3, 4, requires_grad=True)
        out = functional.prune(x * 1.0, mask, in_place=True)
        watch(out)
        loss = (out * 2.0).sum()
        with torch.autograd.profiler.profile(use_kineto=False) as profile:
            loss.backward(torch.ones(()))
        assert x.grad is not None
        assert not x.grad.any()
        return [event.name for event in profile.function_events].count("aten::empty_like")

    held: list[Tensor] = []
    assert new_tensors(lambda out: None) == 0
    assert new_tensors(lambda out: out.register_hook(held.append)) == 1
    assert held[0].tolist() == torch.full((3, 4), 2.0).tolist()


def test_gradients_of_gradients() -> None:
    """What a penalty on gradients needs: the derivative of the clipped gradient by what is up and downstream."""
    x = torch.randn(4, 6, 5, 5)
    mask = mask_for(x)

    def found(way: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf, factor = x.clone().requires_grad_(), (20 * torch.randn(4, 6, 5, 5)).requires_grad_()
        out = way(leaf * 1.0)
        [grad] = torch.autograd.grad((out * factor).sum(), leaf, create_graph=True)
        second = torch.autograd.grad(grad.square().sum(), (factor, leaf), allow_unused=True)
        return [grad.detach(), second[0], torch.zeros(()) if second[1] is None else second[1]]

    ways: list[Callable[[Tensor], Tensor]] = [
        lambda y: quantized(y, mask),
        lambda y: quantized(y, mask, rectify=True),
        lambda y: functional.quantize(y, 8, torch.arange(6, dtype=torch.int32), axis=1),
        lambda y: functional.prune(y, mask),
        lambda y: quantize_checked(y.tanh(), BOUNDS, D, "trunc", "clip_value", None, mask, False, sole_reader=True),
    ]
    for way in ways:
        torch.manual_seed(1)
        first = found(way)
        torch.manual_seed(1)
        second = without(lambda: found(way))  # noqa: B023
        torch.manual_seed(1)
        with kernels.unused():
            third = found(way)
        assert first[1].any()
        assert first[2].any() == (way is ways[-1])  # a tanh bends
        for a, b, c in zip(first, second, third, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


class _Ordinary(TorchDispatchMode):
    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:  # type: ignore[type-arg]
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_what_the_kernels_do_not_fit_is_left_to_python() -> None:
    x, upstream = sample((4, 6, 5, 5), 7, torch.contiguous_format), torch.randn(4, 6, 5, 5)
    both(quantized, x.double(), upstream.double(), node=False)
    both(lambda y: quantized(y[:, :, :, ::2]), x, upstream[:, :, :, ::2].contiguous(), node=False)
    both(lambda y: quantized(y, torch.ones(6, 5, 5).double()), x, upstream, node=False)
    with _Ordinary():
        assert not is_node(quantized(x.clone().requires_grad_() * 1.0))
    assert not is_node(functional.quantize(x.clone().requires_grad_(), 8, 4, gradient="in_range"))
    mask = torch.ones(6, 5, 5, requires_grad=True)  # one that is learned
    functional.prune(x.clone().requires_grad_(), mask).backward(upstream)
    assert mask.grad is not None


def test_an_error_is_that_of_the_function_in_python() -> None:
    leaf = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        quantized(leaf, in_place=True)
    x = torch.randn(2, 3, 4)
    with pytest.raises(Exception, match="need an axis of that size"):
        functional.quantize(x, 8, torch.arange(5, dtype=torch.int32), axis=1)


def test_work_in_place_is_noticed_by_those_who_need_what_was_there() -> None:
    x = torch.randn(3, 4, requires_grad=True).exp()  # its gradient needs its result
    before = x._version
    out = quantized(x, in_place=True)
    assert out.data_ptr() == x.data_ptr()
    assert x._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_without_gradients_and_in_inference_mode() -> None:
    x = torch.randn(3, 4)
    expected = without(lambda: [quantized(x)])[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same_bits(quantized(x), expected)
            assert same_bits(quantized(x.clone(), in_place=True), expected)


def test_kernels_that_are_not_used_leave_nodes_unused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert is_node(quantized(x * 1.0))
    with kernels.unused():
        assert not is_node(quantized(x * 1.0))
