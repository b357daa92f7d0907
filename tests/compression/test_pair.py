"""A pruner and a quantizer of one tensor: one function has the bits of the two, and hooks on them are called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qprune.compression.feature import FeatureOperators
from qprune.compression.functional import prune, quantize
from qprune.compression.operator import Operator
from qprune.compression.pair import WeightOperators
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer


def activated(module: nn.Module) -> nn.Module:
    for operator in module.modules():
        if isinstance(operator, Operator):
            operator.active = True
        if isinstance(operator, Pruner):
            operator.mask.copy_(torch.rand(operator.mask.shape) > 0.5)
        if isinstance(operator, Quantizer):
            operator.decimal.copy_(torch.randint(4, 7, operator.decimal.shape))
    return module


def compressed_layer(axis: int | None = 1) -> nn.Conv2d:
    layer = Quantizer(8, axis=axis).on(Pruner(0.5).on(nn.Conv2d(3, 4, 3)))
    activated(layer)
    return layer


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_weight_s_operators_in_one_function_have_the_bits_of_the_two(axis: int | None) -> None:
    torch.manual_seed(0)
    layer = compressed_layer(axis)
    chain = layer.parametrizations["weight"]  # type: ignore[index]
    pruner, quantizer = chain
    original = chain.original
    incoming = torch.randn(original.shape) * 20  # of which some is clipped
    layer.weight.backward(incoming)
    gradient, original.grad = original.grad, None
    weight = quantize(prune(original, pruner.mask), 8, quantizer.decimal, axis=axis)
    weight.backward(incoming)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(gradient, original.grad)
    assert not torch.equal(gradient, incoming * pruner.mask)


def test_hooks_on_operators_are_called_and_change_no_bit() -> None:
    torch.manual_seed(0)
    layer = compressed_layer()
    operators = FeatureOperators(Pruner(0.5), Quantizer(8))
    x = torch.randn(2, 3, 5, 5)
    operators.pruner.size_for_feature(x)  # type: ignore[union-attr]
    activated(operators)
    before = layer.weight, operators(x)
    calls: list[tuple[str, Tensor]] = []
    for module in (layer, operators):
        for name, operator in module.named_modules():
            if isinstance(operator, Operator):
                operator.register_forward_hook(lambda _m, _a, out, name=name: calls.append((name, out)))
    after = layer.weight, operators(x)
    assert [name for name, _ in calls] == [
        "parametrizations.weight.0",
        "parametrizations.weight.1",
        "pruner",
        "quantizer",
    ]
    for old, new, last in zip(before, after, (calls[1][1], calls[3][1]), strict=True):
        assert torch.equal(old, new)
        assert torch.equal(new, last)


def test_hooks_on_gradients_of_operators_are_called() -> None:
    layer = compressed_layer()
    calls: list[str] = []

    def note(operator: nn.Module, given: Any, got: Any) -> None:
        calls.append(type(operator).__name__)

    for operator in layer.parametrizations["weight"]:  # type: ignore[index]
        operator.register_full_backward_hook(note)
    layer.weight.sum().backward()
    assert calls == ["Quantizer", "Pruner"]


def test_operators_placed_the_other_way_round_act_in_that_order() -> None:
    layer = Pruner(0.5).on(Quantizer(8, decimal=1, rounding="floor").on(nn.Linear(6, 5)))
    activated(layer)
    quantizer, pruner = layer.parametrizations["weight"]  # type: ignore[index]
    expected = quantizer(layer.parametrizations["weight"].original) * pruner.mask  # type: ignore[index]
    assert torch.equal(layer.weight, expected)


def test_another_parametrization_behind_is_called() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = compressed_layer()
    expected = 2 * layer.weight
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert torch.equal(layer.weight, expected)


def test_copies_and_removal_work_as_for_any_parametrization() -> None:
    layer = compressed_layer()
    other = copy.deepcopy(layer)
    chain = other.parametrizations["weight"]  # type: ignore[index]
    assert type(chain) is WeightOperators
    assert torch.equal(other.weight, layer.weight)
    with torch.no_grad():
        chain.original.zero_()
    assert not torch.equal(other.weight, layer.weight)
    expected = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, expected)
    assert type(layer.weight) is nn.Parameter
