"""Every fast path against the plain one: the same bits, forward and backward, of operators and of whole training."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qprune.compression import functional
from qprune.compression import native as kernels
from qprune.compression import prepare as placement
from qprune.compression.compressor import attach
from qprune.compression.config import Pruning, Quantization
from qprune.compression.fake_quantize import power_of_two
from qprune.compression.plan import Plan
from qprune.compression.pruner import Pruner
from qprune.compression.schedule import Timeline

needs_compiler = pytest.mark.skipif(not kernels.load(), reason="no C compiler here makes the kernels")
kernels._library, LIBRARY = None, kernels._library  # each test says what it uses


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library", LIBRARY)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in type, shape, layout and bits; zeros by sign, NaN as NaN."""
    numbers = ~b.isnan()
    return (
        (a.dtype, a.shape) == (b.dtype, b.shape)
        and all(p == q for n, p, q in zip(a.shape, a.stride(), b.stride(), strict=True) if n > 1)
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a[numbers].view(torch.int32), b[numbers].view(torch.int32))
    )


def plain(
    x: Tensor, upstream: Tensor, d: Tensor, bits: int, rounding: str, gradient: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Eq. 1 to 3 as they were first written here, one function of torch after the other, and the gradient by hand."""
    low, high, scale, step = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1, power_of_two(d), power_of_two(-d)
    masked = x if mask is None else x * mask
    clamped = (masked * scale).clamp(low, high)
    rounded = {"trunc": clamped - clamped.frac(), "floor": clamped.floor(), "nearest": clamped.round()}[rounding]
    grad = upstream
    if gradient == "clip_value":
        grad = torch.clamp(upstream, low * step, high * step)
    elif gradient == "in_range":
        whole = {"trunc": torch.trunc, "floor": torch.floor, "nearest": torch.round}[rounding](masked * scale)
        grad = upstream * ((whole >= low) & (whole <= high))
    return rounded * step, grad if mask is None else grad * mask


def sample(shape: tuple[int, ...], seed: int, layout: torch.memory_format) -> Tensor:
    """Numbers of all magnitudes, with a few that are special."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(4).exp()
    special = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, -0.3, 1e-42, 3e38])
    x.view(-1)[: len(special)] = special[: x.numel()]
    return x.to(memory_format=layout) if len(shape) == 4 else x


LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [(5, 8, 6, 7), (3, 1, 9, 9), (1, 16, 4, 4), (40, 12, 10, 10), (6, 33)]


@needs_compiler
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rounding", functional.ROUNDINGS)
@pytest.mark.parametrize("gradient", functional.GRADIENTS)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_features_have_the_same_bits_on_every_path(
    shape: tuple[int, ...], layout: torch.memory_format, rounding: str, gradient: str, with_mask: bool, in_place: bool
) -> None:
    x, upstream = sample(shape, 1, layout), sample(shape, 2, layout)
    mask = (torch.rand_like(x[0], memory_format=torch.preserve_format) > 0.5).float() if with_mask else None
    d = torch.tensor(4, dtype=torch.int32)
    expected = plain(x, upstream, d, 8, rounding, gradient, mask)

    def found() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        made = leaf * 1.0  # what may be overwritten is never a leaf
        out = functional.quantize(made, 8, d, rounding, gradient, mask=mask, in_place=in_place)
        assert (out.data_ptr() == made.data_ptr()) == in_place
        out.backward(upstream)
        assert leaf.grad is not None
        return out.detach(), leaf.grad

    for out, grad in (found(), without_kernels(found)):
        assert same_bits(out, expected[0])
        assert same_bits(grad, expected[1])


def without_kernels(function: Callable[[], Any]) -> Any:
    with kernels.unused():
        return function()


@needs_compiler
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("shape", [(8, 6, 3, 5), (6, 8, 1, 1), (130, 320, 1, 1)], ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
def test_weights_with_decimals_of_their_own_have_the_same_bits(
    shape: tuple[int, ...], axis: int, layout: torch.memory_format, with_mask: bool
) -> None:
    x, upstream = sample(shape, 3, layout), sample(shape, 4, layout)
    mask = (torch.rand_like(x) > 0.5).float() if with_mask else None
    d = torch.arange(shape[axis], dtype=torch.int32) % 12 - 3
    along = d.view([-1 if dim == axis else 1 for dim in range(4)])
    for rounding in functional.ROUNDINGS:
        expected = plain(x, upstream, along, 8, rounding, "clip_value", mask)
        leaf = x.clone().requires_grad_()
        out = functional.quantize(leaf, 8, d, rounding, axis=axis, mask=mask)
        out.backward(upstream)
        assert leaf.grad is not None
        assert same_bits(out.detach(), expected[0])
        assert same_bits(leaf.grad, expected[1])


@needs_compiler
@pytest.mark.usefixtures("compiled")
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(2, 16),
    st.integers(-20, 25),
    st.sampled_from(functional.ROUNDINGS),
)
def test_any_number_has_the_same_bits(values: list[float], bits: int, decimal: int, rounding: str) -> None:
    x = torch.tensor(values)
    for d in (decimal, torch.tensor(decimal, dtype=torch.int32)):
        with_them = functional.quantize(x, bits, d, rounding)
        with kernels.unused():
            assert same_bits(with_them, functional.quantize(x, bits, d, rounding))


@needs_compiler
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("batch", [1, 2, 7, 15, 16, 17, 128, 255, 300, 4099])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_add_up_to_the_same_bits(batch: int, threads: int, layout: torch.memory_format) -> None:
    shape = (32, 17, 17) if batch < 100 else (32, 4, 4)
    # of so many magnitudes that the order of the sum shows
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)).mul(8).exp().to(memory_format=layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        totals = []
        for context in (kernels.unused, nullcontext):
            pruner = Pruner()
            pruner.size_for_feature(x)
            with context():
                pruner.observe(x[: max(1, batch - 1)])
                pruner.observe(x)
            totals.append(pruner.total)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*totals)
    assert torch.allclose(totals[0], x.double().abs().sum(0) + x[: max(1, batch - 1)].double().abs().sum(0), rtol=1e-14)


@needs_compiler
@pytest.mark.usefixtures("compiled")
@given(
    st.integers(1, 3 * 8192 + 5), st.sampled_from(functional.ROUNDINGS), st.sampled_from([2, 8, 16]), st.integers(-8, 8)
)
def test_sums_of_squared_errors_are_those_of_torch(size: int, rounding: str, bits: int, magnitude: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 2.0**magnitude
    candidates = range(-4, 20)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(functional.squared_errors(x, bits, candidates, rounding))
    finally:
        torch.set_num_threads(before)
    with kernels.unused():
        expected = functional.squared_errors(x, bits, candidates, rounding)
    assert torch.equal(*found)
    assert torch.allclose(found[0], expected, rtol=1e-12, atol=0)


@needs_compiler
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_show_in_sums_of_errors(special: float) -> None:
    x = torch.zeros(20_000)
    x[17_000] = special
    assert not functional.squared_errors(x, 8, range(20)).isfinite().any()


def test_what_does_not_fit_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library", object())  # calling it would fail
    x, d = torch.randn(4, 3, 5, 5), torch.tensor(4)
    for unfit in (x.double(), x.to(torch.bfloat16), x[:, :, ::2], x.transpose(0, 1), x.to("meta")):
        functional.quantize(unfit, 8, d)
    channels_last = x.to(memory_format=torch.channels_last)
    functional.quantize(channels_last, 8, d, mask=torch.ones(3, 5, 5))
    functional.quantize(x, 8, d, mask=torch.ones(3, 1, 1))


@needs_compiler
@pytest.mark.usefixtures("compiled")
def test_a_gradient_that_nothing_changes_is_handed_on() -> None:
    mask = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1).repeat(1, 40, 40)
    grad = torch.randn(4, 3, 40, 40) * mask  # as it comes through a ReLU
    d = torch.tensor(4, dtype=torch.int32)
    assert kernels.clip_gradient(grad, d, None, (-128, 127), mask) is grad
    grad[3, 2, 39, 39] = 9.0
    clipped = kernels.clip_gradient(grad, d, None, (-128, 127), mask)
    assert clipped is not None
    assert float(clipped[3, 2, 39, 39]) == 127 / 16
    assert float(grad[3, 2, 39, 39]) == 9.0


class Small(nn.Module):
    """Every kind of layer that may be overwritten, and some that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.tanh = nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()
        self.pool, self.linear = nn.AvgPool2d(4), nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + self.tanh(self.conv2(x))
        return self.linear(self.pool(x).flatten(1))


GLOBS: dict[str, list[str]] = {
    "quantize_weights": ["**"],
    "prune_weights": ["conv2", "linear"],
    "quantize_features": ["input", "conv1", "bn1", "tanh", "pool", "linear"],
    "prune_features": ["bn1", "conv2", "linear"],
}


def trained(steps: int = 12) -> tuple[list[Tensor], nn.Module]:
    """Losses and network of a training with every phase."""
    torch.manual_seed(0)
    network = Small()
    timeline = Timeline((3, 5), 7, 9, window=8, steps_per_epoch=100, batch_size=4, last_batch_size=4)
    compressor = attach(
        network, Plan.from_globs(network, **GLOBS), timeline, torch.zeros(1, 2, 8, 8), Pruning(window=8), Quantization()
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        compressor.at(step)
        x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = network(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, network


@needs_compiler
def test_training_has_the_same_bits_with_kernels_in_place_and_with_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for library in (None, LIBRARY):
        for may in (placement._is_sole_reader, lambda module, output: False):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "_library", library)
                patch.setattr(placement, "_is_sole_reader", may)
                results.append(trained())
    losses, network = results[0]
    for others, other in results[1:]:
        assert [float(loss) for loss in others] == [float(loss) for loss in losses]
        for name, value in network.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def test_only_outputs_that_nobody_else_has_are_overwritten() -> None:
    _, network = trained()
    sites = {name: module for name, module in network.named_modules() if hasattr(module, placement.OUTPUT_CHILD)}
    may = {name: placement._is_sole_reader(module, torch.zeros(2)) for name, module in sites.items()}
    assert may == {"conv1": True, "bn1": True, "conv2": True, "tanh": True, "pool": True, "linear": True}
    assert [name for name, module in sites.items() if not getattr(module, placement.OUTPUT_CHILD).fresh] == ["tanh"]
    assert not placement._is_sole_reader(sites["bn1"], torch.zeros(2)[:1])  # a view: its base is somebody's
    sites["bn1"].register_forward_hook(lambda module, args, output: None)  # who knows what it keeps
    assert not placement._is_sole_reader(sites["bn1"], torch.zeros(2))
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert not placement._is_sole_reader(sites["conv1"], torch.zeros(2))
    handle.remove()
    assert placement._is_sole_reader(sites["conv1"], torch.zeros(2))
