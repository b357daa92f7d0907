"""Look at what the functions of a network are really given, without qprune's own trace."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Functions that multiply a feature by a weight: position of the feature and of the weight among their arguments.
_PRODUCTS = {"convolution": (0, 1), "mm": (0, 1), "addmm": (1, 2)}


class Given(TorchDispatchMode):
    """Records the operands of convolutions and matrix products.

    Args:
        network: With plain parameters.
        example: What it will be given. What does not follow from it, such as coordinates, is no feature.

    Attributes:
        weights: Names of the parameters that are multiplied as they are.
        features: The other operands, each once, by the place of its memory.
    """

    def __init__(self, network: nn.Module, example: Any) -> None:
        super().__init__()
        self.known = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]  # alive: no id is used twice
        self.ids = {id(tensor) for tensor in self.known}
        self.names = {_place(parameter): name for name, parameter in network.named_parameters()}
        self.weights: set[str] = set()
        self.features: dict[tuple[int, int], Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for position in _PRODUCTS.get(func.overloadpacket.__name__, ()):
            operand = args[position]
            if name := self.names.get(_place(operand)):
                self.weights.add(name)
            elif id(operand) in self.ids:
                self.features[_place(operand)] = operand
        found = func(*args, **(kwargs or {}))
        if any(id(leaf) in self.ids for leaf in tree_leaves((args, kwargs))):
            made = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
            self.known += made
            self.ids.update(map(id, made))
        return found


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.untyped_storage().data_ptr(), tensor.numel()


def on_grid(x: Tensor, bits: int, axis: int | None = None) -> bool:
    """Whether x, or each of its slices along `axis`, consists of whole multiples of a 2^-d that fit `bits` bits."""
    rows = x.detach().double().reshape(1, -1) if axis is None else x.detach().double().movedim(axis, 0).flatten(1)
    largest = rows.abs().amax(1, keepdim=True)
    # On a grid of more than that many fraction bits, the largest would not fit; and finer grids hold coarser ones.
    finest = torch.log2(2 ** (bits - 1) / largest.clamp(min=1e-300)).floor()
    scaled = rows * torch.exp2(finest)
    return torch.equal(scaled, scaled.round())
