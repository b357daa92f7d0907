"""Operators with the ReLU behind them in one pass: the same bits as one by one, and only where that is sound."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qprune.compression import native as kernels
from qprune.compression.compressor import Compressor, attach
from qprune.compression.config import Pruning, Quantization
from qprune.compression.fake_quantize import quantize_checked
from qprune.compression.packing import packed_features
from qprune.compression.plan import Plan
from qprune.compression.rectified import find_rectified, rectified_features
from qprune.compression.schedule import Timeline
from qprune.errors import RunFailure
from tests.compression.test_native import same_bits

needs_compiler = pytest.mark.skipif(not kernels.load(), reason="no C compiler here makes the kernels")
kernels._library, LIBRARY = None, kernels._library  # each test says what it uses


def use(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr(kernels, "_library", LIBRARY if compiled else None)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@given(data=st.data())
def test_one_pass_has_the_bits_of_one_after_the_other(data: st.DataObject, compiled: bool) -> None:
    draw = data.draw
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5)), *[draw(st.integers(1, 9))] * 2)
    bits, d = draw(st.integers(2, 12)), torch.tensor(draw(st.integers(-3, 9)), dtype=torch.int32)
    bounds, rounding = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), draw(st.sampled_from(["trunc", "floor", "nearest"]))
    layout = draw(st.sampled_from([torch.channels_last, torch.contiguous_format]))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-2, 3))
    x.view(-1)[0] = draw(st.sampled_from([0.0, -0.0, -0.3, float("inf"), float("-inf"), float("nan")]))
    x, upstream = x.to(memory_format=layout), torch.randn(shape, generator=generator).to(memory_format=layout) * 100
    mask = (torch.rand_like(x[0]) > 0.5).float() if draw(st.booleans()) else None

    def both(rectify: bool) -> tuple[Tensor, Tensor]:
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        inner = leaf * 1.0  # a tensor that may be overwritten
        out = quantize_checked(inner, bounds, d, rounding, "clip_value", None, mask, True, rectify=rectify)
        out = out if rectify else F.relu(out)
        [grad] = torch.autograd.grad(out, leaf, upstream)
        return out.detach(), grad

    with pytest.MonkeyPatch.context() as patch:
        use(patch, compiled)
        apart, together = both(rectify=False), both(rectify=True)
    assert same_bits(together[0], apart[0])
    assert same_bits(together[1], apart[1])


class Net(nn.Module):
    """Two layers with a norm each; `after` is what the forward does with the first norm's output."""

    def __init__(self, after: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.after, self.kept = after, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Any:
        hidden = self.after(self, self.norm1(self.conv1(x)))
        hidden, *more = hidden if isinstance(hidden, tuple) else (hidden,)
        out = F.relu(self.norm2(self.conv2(hidden))).mean(dim=(2, 3))
        return (out, *more) if more else out


def keeping(network: Net, x: Tensor) -> Tensor:
    network.kept.append(x)
    return F.relu(x)


def keeping_a_view(network: Net, x: Tensor) -> Tensor:
    network.kept.append(x.flatten(1))
    return F.relu(x)


def keeping_a_copy(network: Net, x: Tensor) -> Tensor:
    network.kept.append(x.detach())
    return F.relu(x)


SOUND: dict[str, Callable[[Net, Tensor], Any]] = {
    "a function": lambda network, x: F.relu(x),
    "a module, in place": lambda network, x: network.relu(x),
    "a method": lambda network, x: x.relu(),
    "a function of torch, and its shape is read": lambda network, x: torch.relu(x) if x.shape[1] == 8 else x,
}
UNSOUND: dict[str, Callable[[Net, Tensor], Any]] = {
    "another activation": lambda network, x: F.leaky_relu(x),
    "a second reader": lambda network, x: F.relu(x) + x.abs(),
    "two ReLUs": lambda network, x: F.relu(x) + F.relu(x),
    "a reader of a view": lambda network, x: F.relu(x.transpose(2, 3)),
    "the caller": lambda network, x: (F.relu(x), x),
    "kept": keeping,
    "a view kept": keeping_a_view,
    "a copy kept": keeping_a_copy,
}


def compressed(after: Callable[[Net, Tensor], Any]) -> tuple[Net, Compressor]:
    torch.manual_seed(0)
    network = Net(after).to(memory_format=torch.channels_last)
    times = Timeline(
        steps_per_epoch=8, batch_size=4, last_batch_size=4, prune_steps=(1,), weight_step=2, feature_step=2, window=4
    )
    plan = Plan.from_globs(network, ["conv?"], ["conv2"], ["norm?"], ["norm?"])
    return network, attach(network, plan, times, torch.randn(4, 3, 9, 9), Pruning(), Quantization())


@pytest.mark.parametrize("after", SOUND.values(), ids=SOUND)
def test_features_that_a_relu_alone_reads_are_found(after: Callable[[Net, Tensor], Any]) -> None:
    network, compressor = compressed(after)
    found = find_rectified(network, torch.randn(2, 3, 9, 9))
    assert {operators.site for operators in found} == {"norm1", "norm2"}
    assert not any(placed.operator.active for placed in compressor.placed)


@pytest.mark.parametrize("after", UNSOUND.values(), ids=UNSOUND)
def test_others_are_left(after: Callable[[Net, Tensor], Any]) -> None:
    network, _ = compressed(after)
    assert "norm1" not in {operators.site for operators in find_rectified(network, torch.randn(2, 3, 9, 9))}


def trained(after: Callable[[Net, Tensor], Any], fused: bool, packed: bool = False) -> dict[str, Tensor]:
    network, compressor = compressed(after)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    found = find_rectified(network, torch.randn(2, 3, 9, 9)) if fused else []
    torch.manual_seed(1)
    images, targets = torch.randn(8, 4, 3, 9, 9), torch.randn(8, 4, 8)
    for step in range(8):
        compressor.at(step)
        optimizer.zero_grad()
        with packed_features() if packed else nullcontext(), rectified_features(found):
            F.mse_loss(network(images[step]), targets[step]).backward()
        optimizer.step()
    assert all(operators.hand_on is None for operators in found)
    copy.deepcopy(network)
    return network.state_dict()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("after", SOUND.values(), ids=SOUND)
def test_training_ends_with_the_same_bits(
    after: Callable[[Net, Tensor], Any], compiled: bool, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, compiled)
    apart, together = trained(after, fused=False), trained(after, fused=True, packed=packed)
    for name, value in apart.items():
        assert torch.equal(together[name], value), name


def active(after: Callable[[Net, Tensor], Any]) -> Net:
    network, compressor = compressed(after)
    for step in range(3):
        compressor.at(step)
        network(torch.randn(4, 3, 9, 9))
    return network


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (lambda network, x: F.relu(x + 1) if network.training else F.relu(x), "add reads it"),
        (lambda network, x: x.new_zeros(x.shape) if network.training else F.relu(x), "new_zeros reads it"),
    ],
    ids=["another reader", "no ReLU"],
)
def test_a_network_that_does_otherwise_in_training_is_refused(after: Callable[[Net, Tensor], Any], why: str) -> None:
    network = active(after)
    found = find_rectified(network, torch.randn(2, 3, 9, 9))
    assert len(found) == 2
    expected = (
        "the feature of 'norm1' was read by one ReLU alone in a pass of the example, but in training "
        f"{why}; type trainer.fuse_relu=false"
    )
    with pytest.raises(RunFailure) as caught, rectified_features(found):
        network(torch.randn(4, 3, 9, 9))
    assert str(caught.value) == expected
    assert all(operators.hand_on is None for operators in found)


def test_a_relu_that_is_never_called_is_noticed() -> None:
    network = active(lambda network, x: torch.zeros(4, 8, 9, 9) if network.training else F.relu(x))
    found = find_rectified(network, torch.randn(2, 3, 9, 9))
    refused = pytest.raises(RunFailure, match=r"but in training none was called; type trainer.fuse_relu=false")
    with refused, rectified_features(found):
        network(torch.randn(4, 3, 9, 9))
