"""Pruner and Quantizer on their own: windows, tiles, sizes, state."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qprune.compression.functional import (
    ROUNDINGS,
    fake_quantize,
    magnitude_mask,
    optimal_decimal,
    prune,
    squared_errors,
)
from qprune.compression.operator import Operator
from qprune.compression.prepare import FeatureOperators
from qprune.compression.pruner import Pruner, tile_mask
from qprune.compression.quantizer import AUTHORS_DECIMALS, Quantizer
from qprune.compression.schedule import cubic_ramp
from qprune.errors import UserError


def observing(operator: Pruner | Quantizer) -> None:
    operator.observing = True
    operator.start_window()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2**16))
def test_running_sum_equals_the_stored_window(batches: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    window = [torch.randn(size, 3, 4, 5, generator=generator) for size in batches]
    pruner = Pruner(0.5)
    pruner.size_for_feature(window[0])
    observing(pruner)
    for x in window:
        assert pruner(x) is x  # observing alone changes nothing
    stored = torch.cat(window).double().abs().sum(0)
    assert torch.allclose(pruner.window, stored, rtol=1e-14)
    pruner.update(pruner.window, 1.0)
    assert torch.equal(pruner.mask.bool(), magnitude_mask(stored, 0.5))
    assert int(pruner.updates) == 1


@given(st.integers(0, 999), st.integers(1, 3000), st.integers(1, 6))
def test_zeros_of_every_event_are_those_of_whole_numbers(thousandths: int, n: int, events: int) -> None:
    pruner, score = Pruner(thousandths / 1000), torch.arange(float(n))
    pruner.size_for_weight(score)
    for k in range(1, events + 1):
        pruner.update(score, cubic_ramp(k, events))
        zeros = thousandths * n * (events**3 - (events - k) ** 3) // (1000 * events**3)
        assert int((pruner.mask == 0).sum()) == zeros
        assert pruner.density == (n - zeros) / n


def test_channels_are_ranked_by_their_mean() -> None:
    x = torch.randn(6, 8, 5, 7, generator=torch.Generator().manual_seed(0))
    pruner = Pruner(0.5, granularity="channel")
    pruner.size_for_feature(x)
    observing(pruner)
    pruner(x[:2])
    pruner(x[2:, :, :3])  # sizes may differ
    expected = x[:2].abs().mean((2, 3)).sum(0) + x[2:, :, :3].abs().mean((2, 3)).sum(0)
    assert pruner.window.shape == (8, 1, 1)
    assert torch.allclose(pruner.window.flatten().float(), expected)


def test_only_the_windows_samples_count() -> None:
    x = torch.ones(4, 2, 1, 1)
    pruner = Pruner()
    pruner.size_for_feature(x)
    observing(pruner)
    pruner.sample_limit = 3
    pruner(x)
    assert pruner.window.flatten().tolist() == [3.0, 3.0]


def test_evaluation_observes_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1), Pruner(), Quantizer())
    for operator in (network[1], network[2]):
        operator.owner = (network,)
        operator.observing = True
    network[1].size_for_feature(torch.ones(1, 1, 2, 2))
    network.eval()
    network(torch.ones(1, 1, 2, 2))
    assert [operator.window for operator in network[1:]] == [None, None]
    network.train()
    network[1].eval()  # a frozen norm puts its children into evaluation mode: they observe all the same
    network(torch.ones(1, 1, 2, 2))
    assert float(network[1].window.sum()) > 0
    assert network[2].window.shape == (2, 27)  # each candidate, and its error


def test_a_feature_of_another_size_in_training_is_refused() -> None:
    pruner = Pruner()
    pruner.size_for_feature(torch.ones(1, 2, 4, 4))
    observing(pruner)
    with pytest.raises(UserError, match=r"shape \(2, 5, 5\) reached a pruner that was sized for \(2, 4, 4\)"):
        pruner(torch.ones(1, 2, 5, 5))


def test_tiles_are_centred_and_go_on_at_the_border() -> None:
    mask = torch.tensor([[[1.0, 0.0, 1.0]]])
    assert tile_mask(mask, (1, 8)).flatten().tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    assert tile_mask(mask, (1, 8), border="keep").flatten().tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    zeros = torch.zeros(1, 1, 3)
    assert tile_mask(zeros, (1, 8), border="tile").sum() == 0
    assert tile_mask(zeros, (1, 8), border="keep").flatten().tolist() == [1, 0, 0, 0, 0, 0, 0, 1]
    assert tile_mask(torch.arange(5.0).view(1, 1, 5), (1, 3)).flatten().tolist() == [1, 2, 3]
    assert tile_mask(zeros, (1, 2), border="keep").flatten().tolist() == [1, 1]


def test_effective_zeros_on_set5_with_the_authors_border() -> None:
    # Spec 2.5: shares of zeros for a 17x17 mask of one half on Set5's low-resolution sizes.
    half = (torch.randperm(17 * 17, generator=torch.Generator().manual_seed(0)) >= 144).float().view(1, 17, 17)
    expected = {(170, 170): 49.8, (85, 85): 49.8, (93, 93): 41.6, (114, 76): 39.9, (96, 96): 39.1}
    found = {size: round(100 * (1 - float(tile_mask(half, size, "keep").mean())), 1) for size in expected}
    assert found == pytest.approx(expected, abs=0.11)


VALUES = (0.0, 0.999)  # with saturation, a window's values are kept


@pytest.mark.parametrize("capacity", [10**6, 400])
def test_windows_are_taken_whole_or_sampled_evenly(capacity: int) -> None:
    x = torch.randn(8, 4, 10, 10, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer(saturate=VALUES)
    quantizer.budget = capacity
    observing(quantizer)
    quantizer(x)
    kept = quantizer.window
    if capacity > x.numel():
        assert torch.equal(kept, x.flatten())
    else:
        assert kept.numel() == capacity
        assert set(kept.tolist()) <= set(x.flatten().tolist())
        assert len(set(kept.tolist())) == capacity
    quantizer.update_by_window(kept)
    assert int(quantizer.decimal) == int(optimal_decimal(x, saturate=VALUES)) == 5
    assert quantizer.window is None


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 400),
    st.sampled_from(ROUNDINGS),
    st.floats(-6, 6),
    st.integers(0, 2**16),
)
def test_sums_of_errors_choose_as_the_values_would(
    batches: list[int], budget: int, rounding: str, magnitude: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    window = [torch.randn(size, 3, 4, 5, generator=generator).mul(2.0**magnitude) for size in batches]
    sums, values = Quantizer(8, AUTHORS_DECIMALS, rounding), Quantizer(rounding=rounding, saturate=VALUES)
    for quantizer in (sums, values):
        quantizer.budget = budget
        observing(quantizer)
        for x in window:
            assert quantizer(x) is x  # observing alone changes nothing
    expected = squared_errors(values.window, 8, range(20), rounding)
    assert sums.window[0].tolist() == list(range(20))
    assert torch.allclose(sums.window[1], expected, rtol=1e-12, atol=0)
    sums.update_by_window(sums.observed())
    assert int(sums.decimal) == int(optimal_decimal(values.window, decimals=range(20), rounding=rounding))
    assert sums.window is None


def test_the_smallest_decimal_of_equal_sums_is_chosen() -> None:
    quantizer = Quantizer(decimal=AUTHORS_DECIMALS)
    observing(quantizer)
    for value in (0.5, -3.5, 12.5):  # on the grids of d = 1 to 3 without an error
        quantizer(torch.full((3, 700, 9), value))
    assert quantizer.window[1, :5].tolist() == [3 * 18_900 * 0.25, 0.0, 0.0, 0.0, 18_900 * (12.5 - 127 / 16) ** 2]
    quantizer.update_by_window(quantizer.observed())
    assert int(quantizer.decimal) == 1


def test_a_split_batch_is_taken_in_as_the_whole_batch() -> None:
    x = torch.randn(8, 400, generator=torch.Generator().manual_seed(0))
    whole, first, second = (Quantizer(saturate=VALUES) for _ in range(3))
    whole.budget, first.budget, second.budget = 160, 80, 80
    second.first_sample = 4
    for operator in (whole, first, second):
        observing(operator)
    whole(x), first(x[:4]), second(x[4:])
    assert torch.equal(whole.observed(), torch.cat([first.observed(), second.observed()]))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40))
def test_what_is_taken_in_does_not_depend_on_the_layout(
    count: int, channels: int, high: int, wide: int, budget: int
) -> None:
    x = torch.randn(count, channels, high, wide, generator=torch.Generator().manual_seed(budget))
    first, last = Quantizer(saturate=VALUES), Quantizer(saturate=VALUES)
    for quantizer, laid_out in ((first, x), (last, x.to(memory_format=torch.channels_last))):
        quantizer.budget, quantizer.first_sample = budget * count, 2
        observing(quantizer)
        quantizer(laid_out)
    assert torch.equal(first.window, last.window)
    size = x[0].numel()
    if budget < size:  # which elements: written out
        places = [[((sample + 2) * 7919 + size // budget * n) % size for n in range(budget)] for sample in range(count)]
        assert torch.equal(first.window, torch.cat([one.flatten()[at] for one, at in zip(x, places, strict=True)]))


def test_a_fixed_decimal_is_never_searched() -> None:
    quantizer = Quantizer(decimal=7)
    quantizer.update(torch.empty(0))
    assert int(quantizer.decimal) == 7


def test_fresh_operators_load_state_of_any_size() -> None:
    pruner, quantizer = Pruner(), Quantizer(axis=1)
    pruner.size_for_feature(torch.ones(1, 2, 3, 3))
    pruner.update(torch.rand(2, 3, 3), 0.5)
    quantizer.size_for_weight(torch.ones(4, 3, 1, 1))
    quantizer.update(torch.randn(4, 3, 1, 1))
    for operator, fresh in ((pruner, Pruner()), (quantizer, Quantizer(axis=1))):
        fresh.load_state_dict(operator.state_dict())
        for name, value in operator.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], value)
        copied = copy.deepcopy(operator)
        assert all(torch.equal(a, b) for a, b in zip(copied.buffers(), operator.buffers(), strict=True))


def test_around_one_layer_as_in_listing_1() -> None:
    layer = Quantizer(8).on(Pruner(0.5).on(nn.Conv2d(10, 30, 3)))
    chain = layer.parametrizations.weight
    assert [type(operator) for operator in chain] == [Pruner, Quantizer]
    with pytest.raises(UserError, match="BatchNorm2d has no weight of two or more dimensions to place an operator on"):
        Pruner().on(nn.BatchNorm2d(3))


def activated(module: nn.Module) -> None:
    for operator in module.modules():
        if isinstance(operator, Operator):
            operator.active = True
            operator.updates += 1
        if isinstance(operator, Pruner):
            operator.mask.copy_(torch.rand(operator.mask.shape) > 0.5)
        if isinstance(operator, Quantizer):
            operator.decimal.copy_(torch.randint(4, 7, operator.decimal.shape))


def compressed_layer(axis: int | None = 1) -> nn.Conv2d:
    layer = Quantizer(8, axis=axis).on(Pruner(0.5).on(nn.Conv2d(3, 4, 3)))
    activated(layer)
    return layer


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_weight_is_pruned_then_quantized_with_the_gradient_of_both(axis: int | None) -> None:
    layer = compressed_layer(axis)
    chain = layer.parametrizations["weight"]
    original, (pruner, quantizer) = chain.original, chain
    incoming = torch.randn(original.shape) * 20  # some of it is clipped
    layer.weight.backward(incoming)
    gradient, original.grad = original.grad, None
    weight = fake_quantize(prune(original, pruner.mask), 8, quantizer.decimal, axis=axis)
    weight.backward(incoming)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(gradient, original.grad)
    assert not torch.equal(gradient, incoming * pruner.mask)


def test_a_feature_is_pruned_and_quantized_in_one_function_with_the_bits_of_two() -> None:
    pruner, quantizer, x = Pruner(0.5), Quantizer(8), torch.randn(2, 3, 5, 5, requires_grad=True)
    operators = FeatureOperators(pruner, quantizer)
    pruner.size_for_feature(x)
    activated(operators)
    incoming = torch.randn(x.shape) * 20
    out = operators(x)
    [gradient] = torch.autograd.grad(out, x, incoming)
    two = quantizer(pruner(x))
    assert torch.equal(out, two)
    assert torch.equal(gradient, torch.autograd.grad(two, x, incoming)[0])


def test_hooks_on_operators_are_called() -> None:
    layer, operators = compressed_layer(), FeatureOperators(Pruner(0.5), Quantizer(8))
    x = torch.randn(2, 3, 5, 5)
    operators.pruner.size_for_feature(x)
    activated(operators)
    calls: list[tuple[str, Tensor]] = []
    for module in (layer, operators):
        for name, inner in module.named_modules():
            if isinstance(inner, Operator | FeatureOperators):
                inner.register_forward_hook(lambda _m, _a, out, name=name: calls.append((name, out)))
    weight, feature = layer.weight, operators(x)
    assert [name for name, _ in calls] == ["parametrizations.weight.0", "parametrizations.weight.1", "quantizer", ""]
    assert calls[1][1] is weight
    assert calls[3][1] is feature


def test_hooks_for_all_modules_see_operators() -> None:
    operators, seen = FeatureOperators(Pruner(0.5), Quantizer(8)), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(type(module).__name__)
    )
    try:
        operators(torch.randn(2, 3, 5, 5))
    finally:
        handle.remove()
    assert seen == ["Pruner", "Quantizer", "FeatureOperators"]


def test_operators_placed_in_reverse_act_in_that_order() -> None:
    layer = Pruner(0.5).on(Quantizer(8, decimal=1, rounding="floor").on(nn.Linear(6, 5)))
    activated(layer)
    quantizer, pruner = layer.parametrizations["weight"]
    assert torch.equal(layer.weight, quantizer(layer.parametrizations["weight"].original) * pruner.mask)


def test_copies_removal_and_further_parametrizations_work_as_for_any() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = compressed_layer()
    other = copy.deepcopy(layer)
    assert torch.equal(other.weight, layer.weight)
    with torch.no_grad():
        other.parametrizations["weight"].original.zero_()
    assert not torch.equal(other.weight, layer.weight)
    expected = 2 * layer.weight.detach()
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert torch.equal(layer.weight, expected)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, expected)
    assert type(layer.weight) is nn.Parameter
