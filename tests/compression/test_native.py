"""The native operator: the same bits as torch's functions, and a run without it wherever it cannot be used."""

import ctypes
import itertools
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qprune.compression import functional, native
from qprune.compression.compressor import attach
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.fake_quantize import FakeQuantize, Grid, power_of_two, use_native
from qprune.compression.plan import Plan
from qprune.compression.schedule import Timeline


@pytest.fixture(scope="module")
def compiled() -> Iterator[None]:
    """Compile the operator once for all tests that compute with it."""
    if not use_native():
        pytest.skip("no C compiler here compiles the native operator")
    yield
    native.unload()


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin without the operator, which nothing has refused yet; put back what was loaded."""
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_refused", False)


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


def on_both_paths(
    x: Tensor, upstream: Tensor, d: Tensor, grid: Grid, mask: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Result and gradient, with the native operator and without."""
    results = []
    for context in (native.disabled, torch.enable_grad):
        leaf = x.clone().requires_grad_()
        with context():
            out = FakeQuantize.apply(leaf, d, mask, grid)
            out.backward(upstream)
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    return results


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_features_have_the_same_bits_on_both_paths(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x, upstream = sample(shape, 1, layout), sample(shape, 2, layout)
    half = (torch.rand_like(x[0], memory_format=torch.preserve_format) > 0.5).float()
    d = torch.tensor(4, dtype=torch.int32)
    for rounding, gradient, mask in itertools.product(functional.ROUNDINGS, functional.GRADIENTS, (None, half)):
        expected = plain(x, upstream, d, 8, rounding, gradient, mask)
        for out, grad in on_both_paths(x, upstream, d, Grid(8, rounding, gradient), mask):
            assert same_bits(out, expected[0]), (rounding, gradient)
            assert same_bits(grad, expected[1]), (rounding, gradient)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("shape", [(8, 6, 3, 5), (6, 8, 1, 1), (130, 320, 1, 1)], ids=str)
def test_weights_with_fraction_bits_per_channel_have_the_same_bits(shape: tuple[int, ...], axis: int) -> None:
    d = torch.arange(shape[axis], dtype=torch.int32) % 12 - 3
    along = d.view([-1 if dim == axis else 1 for dim in range(4)])
    for layout, rounding, masked in itertools.product(LAYOUTS, functional.ROUNDINGS, (False, True)):
        x, upstream = sample(shape, 3, layout), sample(shape, 4, layout)
        mask = (torch.rand_like(x) > 0.5).float() if masked else None
        expected = plain(x, upstream, along, 8, rounding, "clip_value", mask)
        for out, grad in on_both_paths(x, upstream, d, Grid(8, rounding, axis=axis, of_samples=False), mask):
            assert same_bits(out, expected[0]), (rounding, layout)
            assert same_bits(grad, expected[1]), (rounding, layout)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [(64, 1, 5, 5), (8, 3, 1, 1), (1, 1, 1, 1)], ids=str)
def test_strides_are_those_of_the_input_on_both_paths(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    for out, _ in on_both_paths(x, x, torch.tensor(4, dtype=torch.int32), Grid(8), None):
        assert out.stride() == x.stride()


@pytest.mark.usefixtures("compiled")
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(2, 16),
    st.integers(-20, 25),
    st.sampled_from(functional.ROUNDINGS),
)
def test_any_number_has_the_same_bits(values: list[float], bits: int, decimal: int, rounding: str) -> None:
    x = torch.tensor(values)
    with_it = functional.fake_quantize(x, bits, decimal, rounding)
    with native.disabled():
        assert same_bits(with_it, functional.fake_quantize(x, bits, decimal, rounding))


def test_tensors_that_do_not_fit_are_computed_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", object())  # calling it would fail
    x, d = torch.randn(4, 3, 5, 5), torch.tensor(4, dtype=torch.int32)
    for unfit in (x.double(), x.to(torch.bfloat16), x[:, :, ::2], x.transpose(0, 1), x.to("meta")):
        FakeQuantize.apply(unfit, d.to(unfit.device), None, Grid(8))
    FakeQuantize.apply(x.to(memory_format=torch.channels_last), d, torch.ones(3, 5, 5), Grid(8))
    FakeQuantize.apply(x, d, torch.ones(3, 1, 1), Grid(8))


GLOBS: dict[str, list[str]] = {
    "quantize_weights": ["**"],
    "prune_weights": ["3", "6"],
    "quantize_features": ["input", "0", "1", "4", "5"],
    "prune_features": ["1", "3"],
}


def trained(steps: int = 12) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and state of a training run through every phase."""
    torch.manual_seed(0)
    first = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    network = nn.Sequential(*first, nn.Tanh(), nn.AvgPool2d(8), nn.Conv2d(8, 5, 1))
    timeline = Timeline((3, 5), 7, 9, window=8, steps_per_epoch=100, batch_size=4, last_batch_size=4)
    plan, example = Plan.from_globs(network, **GLOBS), torch.zeros(1, 2, 8, 8)
    compressor = attach(network, plan, timeline, example, PruneConfig(window=8), QuantizeConfig())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(steps):
        compressor.at(step)
        x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = network(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network.state_dict()


@pytest.mark.usefixtures("compiled")
def test_training_has_the_same_bits_on_both_paths() -> None:
    losses, state = trained()
    with native.disabled():
        expected_losses, expected = trained()
    assert losses == expected_losses
    for name, value in state.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.usefixtures("compiled", "unloaded")
def test_an_operator_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    with pytest.warns(UserWarning, match="is not used .it does not give torch's bits here.; torch's"):
        assert not use_native()
    assert not use_native()  # said once


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "No such file or directory: 'no-such-compiler'"),
        ("false", "false: exit code 1"),
        ("echo 'unclosed", "No closing quotation"),
        ("", "no C compiler: neither CC is set, nor is there cc or gcc"),
    ],
)
def test_without_a_working_compiler_torch_computes(compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    if not compiler:
        monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=f"the native operator is not used .*{reason}.; torch's functions compute"):
        assert not use_native()
    assert not use_native()  # said once


@pytest.mark.usefixtures("unloaded")
def test_without_a_temporary_folder_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.warns(UserWarning, match="No usable temporary directory found"):
        assert not use_native()


@pytest.mark.usefixtures("compiled", "unloaded")
def test_the_library_is_built_in_a_private_folder_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a CC of several words, too."""
    monkeypatch.setenv("CC", f"env {os.environ.get('CC', 'cc')}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "fake_quantize.so").write_bytes(b"another user's")
    before, folders, cdll = sorted(tmp_path.iterdir()), [], ctypes.CDLL

    def note(path: str) -> Any:
        folders.append((Path(path).parent.parent, Path(path).parent.stat().st_mode & 0o777))
        return cdll(path)

    monkeypatch.setattr(ctypes, "CDLL", note)
    assert use_native()
    assert folders == [(tmp_path, 0o700)]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("compiled")
def test_threads_are_those_of_torch() -> None:
    probe = (
        "import torch; from qprune.compression.fake_quantize import use_native; assert use_native(); "
        "print(sorted({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.count(".so") == 1, done.stdout  # a second pool of threads would compete for the cores
