"""Every network of the zoo: attached, trained through all phases, converted, saved, loaded and copied."""

import copy
import io
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qprune
from qprune.compression.compressor import Compressor
from tests.networks.check import Given, on_grid
from tests.networks.report import PAGE, Row, attached, train
from tests.networks.zoo import ZOO, Network

# What compress says of networks with many sums and attention is not the subject here.
pytestmark = pytest.mark.filterwarnings("ignore:most elements stay float")

EACH = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(
            entry,
            id=f"{entry.library} {entry.name}",
            marks=pytest.mark.skipif(entry.missing, reason=f"{entry.library} is not installed"),
        )
        for entry in ZOO
    ],
)


def outputs(network: nn.Module, example: Any) -> list[Tensor]:
    """All tensors that a network returns in evaluation mode."""
    network.eval()
    found = (
        network(**example)
        if isinstance(example, dict)
        else network(*example if isinstance(example, tuple) else (example,))
    )
    return [
        leaf.detach()
        for leaf in tree_leaves(dict(found) if isinstance(found, dict) else found)
        if isinstance(leaf, Tensor)
    ]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@EACH
@pytest.mark.filterwarnings("ignore:most elements stay float:UserWarning")
def test_a_network_of_others_is_compressed_and_stays_so(entry: Network) -> None:
    compressor, example = attached(entry), entry.example()
    network, fresh = compressor.network, copy.deepcopy(compressor.network)
    train(entry, compressor)
    expected = outputs(network, example)
    assert any(x.is_floating_point() and float(x.std()) > 0 for x in expected)
    converted = compressor.convert()
    assert same(outputs(converted, example), expected)

    content = io.BytesIO()
    torch.save(converted, content)
    content.seek(0)
    assert same(outputs(torch.load(content, weights_only=False), example), expected)
    assert not same(outputs(fresh, example), expected)
    fresh.load_state_dict(network.state_dict())
    assert same(outputs(fresh, example), expected)
    assert same(outputs(copy.deepcopy(network), example), expected)

    said = qprune.coverage(network, example)
    what_is_said_is_true(said, compressor, converted, example)
    if entry.library == "torchvision":  # other packages change their networks more often
        assert str(Row.of(entry, network, said)) in PAGE.read_text(encoding="utf-8")


def what_is_said_is_true(said: qprune.Coverage, compressor: Compressor, converted: nn.Module, example: Any) -> None:
    """Hold coverage to the operands of convolutions and matrix products."""
    given = Given(converted, example)
    with given:
        outputs(converted, example)
    uncovered, pruned = set(said.names("weight")), {p.path for p in compressor.pruners("weight")}
    for name, parameter in converted.named_parameters():
        if parameter.dim() < 2 or name in uncovered:
            continue
        assert name in given.weights, f"{name} is said to be compressed, and something else is multiplied"
        assert on_grid(parameter, 8, 1 if parameter.dim() > 2 else None), name
        if {name, name.removesuffix(".weight")} & pruned:
            assert int((parameter == 0).sum()) >= parameter.numel() // 2, name
    admitted = Counter(tensor.elements for tensor in said.tensors if tensor.kind == "feature")
    off = [x for x in given.features.values() if not on_grid(x, 8, 1 if x.dim() > 2 else x.dim() - 1)]
    hidden = Counter(x.numel() for x in off) - admitted
    assert not hidden, f"floats in features of {dict(hidden)} elements, which coverage does not list"
    for kind, sparsity in compressor.sparsity.items():
        assert sparsity == (pytest.approx(0.5, abs=0.05) if compressor.pruners(kind) else 0.0)
