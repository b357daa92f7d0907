"""Each equation against a slow reference in double precision, and its edges."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qprune.compression.fake_quantize import FakeQuantize, Grid, power_of_two
from qprune.compression.functional import (
    Saturation,
    all_finite,
    fake_quantize,
    integer_range,
    magnitude_mask,
    optimal_decimal,
    prune,
    saturate,
    squared_errors,
)
from qprune.errors import UserError

REFERENCE_ROUNDING = {"trunc": math.trunc, "floor": math.floor, "nearest": round}
numbers = st.floats(min_value=-300, max_value=300, width=32)
lists = st.lists(numbers, min_size=1, max_size=40)


def reference_quantize(x: float, bits: int, decimal: int, rounding: str) -> float:
    """Eq. 1 for one number, in Python's doubles."""
    integer = REFERENCE_ROUNDING[rounding](x * 2.0**decimal)
    return min(max(integer, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1) * 2.0**-decimal


@given(lists, st.integers(2, 16), st.integers(-8, 19), st.sampled_from(["trunc", "floor", "nearest"]))
def test_quantize_equals_the_reference(values: list[float], bits: int, decimal: int, rounding: str) -> None:
    x = torch.tensor(values)
    expected = [reference_quantize(v, bits, decimal, rounding) for v in x.tolist()]
    assert fake_quantize(x, bits, decimal, rounding).tolist() == expected
    as_tensor = torch.tensor(decimal)
    assert torch.equal(fake_quantize(x, bits, as_tensor, rounding), fake_quantize(x, bits, decimal, rounding))


@given(lists, st.integers(2, 12), st.integers(0, 12))
def test_quantize_twice_is_quantize_once(values: list[float], bits: int, decimal: int) -> None:
    once = fake_quantize(torch.tensor(values), bits, decimal)
    assert torch.equal(fake_quantize(once, bits, decimal), once)


def test_truncation_has_a_zero_bin_two_steps_wide() -> None:
    x = torch.tensor([-1.9, -0.5, 0.5, 1.9])
    assert fake_quantize(x, 8, 0).tolist() == [-1.0, 0.0, 0.0, 1.0]
    assert fake_quantize(x, 8, 0, "floor").tolist() == [-2.0, -1.0, 0.0, 1.0]
    assert fake_quantize(x, 8, 0, "nearest").tolist() == [-2.0, 0.0, 0.0, 2.0]


def test_large_values_saturate_and_never_change_sign() -> None:
    x = torch.tensor([5000.0, -5000.0, 3e38, -math.inf])
    assert fake_quantize(x, 8, 19).tolist() == [127 / 2**19, -128 / 2**19, 127 / 2**19, -128 / 2**19]


def test_decimals_along_an_axis_are_those_of_each_slice() -> None:
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    decimals = torch.tensor([2, 5, 7])
    together = fake_quantize(x, 8, decimals, axis=1)
    for channel, decimal in enumerate(decimals.tolist()):
        assert torch.equal(together[:, channel], fake_quantize(x[:, channel], 8, decimal))
    with pytest.raises(UserError, match=r"decimals of shape \(3,\) need an axis of that size"):
        fake_quantize(x, 8, decimals)


@pytest.mark.parametrize("gradient", ["clip_value", "ste", "in_range"])
@pytest.mark.parametrize("decimal", [3, torch.tensor(3)])
def test_pruning_and_quantizing_at_once_is_one_after_the_other(gradient: str, decimal: int | Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    x, upstream = (torch.randn(4, 3, 5, 5, generator=generator) * 20 for _ in range(2))
    mask = (torch.rand(3, 5, 5, generator=generator) > 0.5).float()
    together, apart = x.clone().requires_grad_(), x.clone().requires_grad_()
    one = FakeQuantize.apply(together, torch.as_tensor(decimal, dtype=torch.int32), mask, Grid(8, gradient=gradient))
    other = fake_quantize(prune(apart, mask), 8, decimal, gradient=gradient)
    assert torch.equal(one, other)
    kept = upstream.clone()
    one.backward(upstream), other.backward(upstream)
    assert together.grad is not None
    assert apart.grad is not None
    assert torch.equal(together.grad, apart.grad)
    assert torch.equal(upstream, kept)  # what comes from above is never changed in place


def gradient_of(x: Tensor, upstream: Tensor, decimal: int | Tensor, gradient: str) -> Tensor:
    x = x.clone().requires_grad_()
    fake_quantize(x, 8, decimal, gradient=gradient).backward(upstream)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("decimal", [5, torch.tensor(5)])
def test_gradients(decimal: int | Tensor) -> None:
    x = torch.tensor([0.1, 100.0, -100.0, 1.0])
    upstream = torch.tensor([9.0, -9.0, 0.5, 3.9])
    # Eq. 2 as coded by the authors: the value of the gradient is clamped to [-2^7, 2^7 - 1] * 2^-5, saturated or not.
    assert gradient_of(x, upstream, decimal, "clip_value").tolist() == pytest.approx([3.96875, -4.0, 0.5, 3.9])
    assert gradient_of(x, upstream, decimal, "ste").tolist() == upstream.tolist()
    assert gradient_of(x, upstream, decimal, "in_range").tolist() == pytest.approx([9.0, 0.0, 0.0, 3.9])


@pytest.mark.parametrize("gradient", ["clip_value", "ste", "in_range"])
def test_half_precision_keeps_the_grid(gradient: str) -> None:
    x = torch.linspace(-3, 3, 101).to(torch.bfloat16).requires_grad_()
    eight, twelve = fake_quantize(x, 8, 5, gradient=gradient), fake_quantize(x, 12, 9, gradient=gradient)
    assert (eight.dtype, twelve.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(eight.float(), fake_quantize(x.detach().float(), 8, 5))
    assert torch.equal(twelve, fake_quantize(x.detach().float(), 12, 9))
    (eight.sum() + twelve.sum()).backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 17, 8.0, True])
def test_bits_outside_the_range_are_refused(bits: int) -> None:
    with pytest.raises(UserError, match="is not a whole number from 2 to 16; type for example bits=8"):
        integer_range(bits)


def test_unknown_words_are_refused_with_the_nearest_legal_one() -> None:
    with pytest.raises(UserError, match="rounding='truncate' is not one of trunc, floor, nearest; did you mean 'trun"):
        fake_quantize(torch.zeros(1), rounding="truncate")


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128)
    assert power_of_two(exponents, torch.float64).tolist() == [2.0**e for e in exponents.tolist()]


def test_saturate_clips_to_quantiles() -> None:
    x = torch.arange(101.0)
    assert saturate(x, 0.1, 0.9).tolist() == [min(max(v, 10.0), 90.0) for v in range(101)]
    assert saturate(x, 0.0, 1.0) is x
    with pytest.raises(UserError, match=r"saturate=\[0.9, 0.1\] is not a pair of rising quantiles within \[0, 1\]"):
        saturate(x, 0.9, 0.1)


def reference_decimal(values: list[float], bits: int, rounding: str) -> int:
    errors = [sum((reference_quantize(v, bits, d, rounding) - v) ** 2 for v in values) for d in range(20)]
    return errors.index(min(errors))


@given(
    st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=30),
    st.integers(2, 10),
    st.sampled_from(["trunc", "floor", "nearest"]),
)
def test_optimal_decimal_equals_the_reference(values: list[float], bits: int, rounding: str) -> None:
    chosen = optimal_decimal(torch.tensor(values), bits, decimals=range(20), rounding=rounding)
    assert chosen.shape == ()
    assert int(chosen) == reference_decimal(values, bits, rounding)


def test_optimal_decimal_of_normal_weights() -> None:
    # Spec 1.2: typical d* for 8 bit.
    generator = torch.Generator().manual_seed(0)
    found = {sd: int(optimal_decimal(torch.randn(10_000, generator=generator) * sd)) for sd in (1, 0.1, 0.02, 0.001)}
    assert found == {1: 5, 0.1: 8, 0.02: 11, 0.001: 15}


def test_ties_go_to_the_smallest_decimal_even_with_unsorted_candidates() -> None:
    assert int(optimal_decimal(torch.tensor([1.0, -2.0]), decimals=[4, 3, 0, 2])) == 0
    assert int(optimal_decimal(torch.zeros(3), decimals=range(20))) == 0
    assert int(optimal_decimal(torch.tensor([1000.0]), decimals=range(-6, 20))) == -3


def test_saturation_ignores_outliers() -> None:
    x = torch.cat([torch.linspace(-1, 1, 10_000), torch.tensor([3000.0])])
    assert int(optimal_decimal(x)) < int(optimal_decimal(x, saturate=(0.001, 0.999))) == 7


@settings(max_examples=25)
@given(st.integers(0, 2**16), st.sampled_from([6, 8, 12]))
def test_both_errors_of_saturation_are_minimized_as_written(seed: int, bits: int) -> None:
    """The authors' Q(S(x)) - S(x), and Eq. 7 as printed, Q(x) - S(x)."""
    x = torch.randn(300, generator=torch.Generator().manual_seed(seed)) ** 3  # heavy tails
    saturated = saturate(x, 0.01, 0.99)
    for literal, quantized in ((False, saturated), (True, x)):
        errors = [float((fake_quantize(quantized, bits, d) - saturated).double().square().sum()) for d in range(20)]
        chosen = optimal_decimal(x, bits, Saturation(0.01, 0.99, literal), range(20))
        assert int(chosen) == min(range(20), key=lambda d: (errors[d], d))


def test_eq_7_as_printed_may_choose_other_fraction_bits() -> None:
    """At CycleGAN's 12 bits and quantiles: an outlier that reaches beyond S(x) on a wide grid counts in Eq. 7 alone."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(20_000, generator=generator) ** 3 * 2 ** float(torch.rand((), generator=generator))
    found = [optimal_decimal(x, 12, Saturation(0.0001, 0.9999, literal), range(20)) for literal in (False, True)]
    assert [int(decimal) for decimal in found] == [4, 5]


def test_each_channel_gets_its_own_decimal() -> None:
    x = torch.randn(3, 4, 100, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 0.1, 0.02, 10.0])[:, None]
    chosen = optimal_decimal(x, axis=1)
    assert chosen.tolist() == [int(optimal_decimal(x[:, c])) for c in range(4)]


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_errors_of_parts_add_up(axis: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 1000, generator=torch.Generator().manual_seed(2)).to(dtype)
    whole = squared_errors(x, 8, range(20), axis=axis)
    monkeypatch.setattr("qprune.compression.functional._SEARCH_CHUNK", 128)
    assert torch.allclose(squared_errors(x, 8, range(20), axis=axis), whole, rtol=1e-12)


@pytest.mark.parametrize("x", [torch.tensor([1.0, math.nan]), torch.tensor([math.inf])])
def test_values_that_are_not_finite_are_refused(x: Tensor) -> None:
    with pytest.raises(UserError, match="not all finite"):
        optimal_decimal(x)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(0, 99))
def test_masks_prune_exactly_the_smallest_ties_by_position(values: list[int], percent: int) -> None:
    score = torch.tensor(values, dtype=torch.float32)
    mask = magnitude_mask(score, percent / 100)
    count = percent * len(values) // 100
    smallest = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    assert [i for i, kept in enumerate(mask.tolist()) if not kept] == sorted(smallest)


@given(st.integers(0, 9999), st.integers(1, 4000))
@example(5700, 1200)  # 0.57 * 1200 is 683.9999999999999 in doubles, and 684
@example(2900, 100)
def test_the_number_of_zeros_is_that_of_whole_numbers(ten_thousandths: int, n: int) -> None:
    sparsity, zeros = ten_thousandths / 10_000, ten_thousandths * n // 10_000
    score = torch.arange(float(n))
    assert int((~magnitude_mask(score, sparsity)).sum()) == zeros
    assert int((~magnitude_mask(score, sparsity, "threshold")).sum()) == max(zeros - 1, 0)


def test_dead_neurons_cannot_stop_pruning() -> None:
    score = torch.zeros(8, 4)
    assert int((~magnitude_mask(score, 0.5)).sum()) == 16
    assert bool(magnitude_mask(score, 0.5, rule="threshold").all())  # the authors' rule prunes nothing then


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(UserError, match=r"is not in \[0, 1\); type for example sparsity=0.5"):
        magnitude_mask(torch.ones(4), sparsity)


TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@given(st.lists(st.floats(width=16), max_size=40), st.sampled_from(TYPES))
def test_finiteness_is_that_of_each_element(values: list[float], kind: torch.dtype) -> None:
    x = torch.tensor(values, dtype=kind)
    found = all_finite(x)
    assert (found.dtype, found.shape) == (torch.bool, ())
    assert bool(found) == bool(torch.isfinite(x).all())


@given(st.floats(-40, 40), st.integers(2, 16), st.sampled_from(["trunc", "floor", "nearest"]), st.integers(0, 2**16))
def test_candidates_cover_numbers_of_any_scale(exponent: float, bits: int, rounding: str, seed: int) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    chosen = optimal_decimal(x, bits, rounding=rounding)
    best = optimal_decimal(x, bits, decimals=range(-90, 91), rounding=rounding)
    assert int(chosen) == int(best)


def test_pictures_and_tiny_weights_are_not_cut_off() -> None:
    pictures = torch.arange(256.0)
    d = int(optimal_decimal(pictures))
    assert d == -1
    assert float((fake_quantize(pictures, 8, d) - pictures).abs().max()) <= 2
    assert int(optimal_decimal(pictures, decimals=range(20))) == 0  # the authors' candidates cut off above 127
    weights = torch.randn(64, 9, generator=torch.Generator().manual_seed(0)) * 1e-8
    d = int(optimal_decimal(weights))
    assert float((fake_quantize(weights, 8, d) - weights).norm() / weights.norm()) < 0.03
    assert float(fake_quantize(weights, 8, int(optimal_decimal(weights, decimals=range(20)))).abs().max()) == 0
