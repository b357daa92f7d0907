"""Packed features: the same gradients, less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qprune.compression.packing import packed_features
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer


class Net(nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm, self.quantizer = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), Quantizer(bits, 4)
        self.conv2, self.second, self.head = nn.Conv2d(16, 16, 3), Quantizer(bits, 3), nn.Conv2d(16, 4, 1)
        self.quantizer.active = self.second.active = True

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.quantizer(self.norm(self.conv1(x))))
        return self.head(self.second(torch.tanh(self.conv2(x))))


def kept_bytes(network: nn.Module, x: Tensor, packed: bool) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the bytes of what autograd keeps, each storage once."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    network = copy.deepcopy(network)
    if packed:
        with packed_features():
            network(x).square().sum().backward()
    else:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            network(x).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}, sum(storages.values())


@pytest.mark.parametrize("bits", [4, 8, 12])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_same_bits(bits: int, layout: torch.memory_format) -> None:
    x = torch.randn(4, 3, 16, 16).to(memory_format=layout)
    network = Net(bits).to(memory_format=layout)  # type: ignore[call-overload]
    expected, _ = kept_bytes(network, x, packed=False)
    found, _ = kept_bytes(network, x, packed=True)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_what_lies_on_the_grid_is_kept_as_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def spy(pack: Any, unpack: Any) -> Any:
        def keep(x: Any) -> Any:
            kept.append(pack(x))
            return kept[-1]

        return hooks(keep, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", spy)
    with packed_features():
        Net(8)(torch.randn(4, 3, 16, 16)).sum().backward()
    packed = [item for item in kept if not isinstance(item, Tensor)]
    # ReLU's result, which is the next convolution's input too, is packed once; the head's input once.
    assert [item.integers.dtype for item in packed] == [torch.int8] * 3
    assert packed[0] is packed[1]
    floats = [item for item in kept if isinstance(item, Tensor) and item.dtype == torch.float32 and item.numel() > 9000]
    assert len(floats) == 2  # the norm's input and tanh's result, which lie on no grid


def test_nothing_is_packed_of_an_unquantized_network() -> None:
    network = Net(8)
    network.quantizer.active = network.second.active = False
    x = torch.randn(4, 3, 16, 16)
    expected, found = kept_bytes(network, x, packed=False)[0], kept_bytes(network, x, packed=True)[0]
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_mask_alone_makes_no_grid() -> None:
    pruner = Pruner()
    pruner.size_for_feature(torch.ones(1, 16, 16, 16))
    pruner.active = True
    x = torch.randn(4, 16, 16, 16, requires_grad=True)
    with packed_features():
        pruner(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
