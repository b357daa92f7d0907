"""What Pruner and Quantizer share: modes that are set from outside, and buffers that are sized by what is loaded."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qprune.errors import UserError

LayerT = TypeVar("LayerT", bound=nn.Module)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for a call of this module, or for its gradient."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Operator(nn.Module):
    """A module that owns numbers (buffers) but never time: `active` and `observing` are set by a `Compressor`.

    active: the operator changes its input; otherwise it is the identity.
    observing: it collects the statistics that its next event decides on, while the network is in training mode.
    first_sample, sample_limit: position of this process's batch in the global one, and how many leading samples of
        this process's batch belong to the window (spec 2.3); set with `observing`.
    updates: number of events that have fired; a buffer, so that a checkpoint without them is noticed.
    """

    updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.active = False
        self.observing = False
        self.first_sample = 0
        self.sample_limit: int | None = None
        # The network that is driven, in a tuple so that it is not a submodule. Its mode decides about observation:
        # an operator inside a frozen norm is in evaluation mode for good, and must observe all the same.
        self.owner: tuple[nn.Module, ...] = ()
        self.register_buffer("updates", torch.zeros((), dtype=torch.int32))

    @property
    def collecting(self) -> bool:
        """Whether the input of this call is to be observed."""
        return self.observing and (self.owner[0].training if self.owner else self.training)

    @property
    def at_rest(self) -> bool:
        """Whether a call would do nothing: neither changes its input nor observes it, and nobody waits for a call."""
        return not (self.active or self.observing or has_hooks(self))

    def in_window(self, x: Tensor) -> Tensor:
        """The samples of this call, (B, ...), that belong to the window."""
        x = x.detach()
        return x if self.sample_limit is None else x[: self.sample_limit]

    def on(self, layer: LayerT, name: str = "weight") -> LayerT:
        """Place this operator around `layer.weight` and return the layer, after the operators already there.

        `Quantizer(8).on(Pruner(0.5).on(nn.Conv2d(3, 8, 3)))` is the paper's Listing 1. name: of another parameter
        than `weight`. Raises UserError when the layer has no such parameter of two dimensions or more, or has it from
        a parametrization of another kind.
        """
        from qprune.compression.pair import WeightOperators, read_directly  # made of all kinds of operators

        weight = getattr(layer, name, None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            raise UserError(f"{type(layer).__name__} has no {name} of two or more dimensions to place an operator on")
        if parametrize.is_parametrized(layer, name):
            there = list(layer.parametrizations[name])  # type: ignore[index]
            other = next((type(p).__name__ for p in there if not isinstance(p, Operator)), None)
            twice = any(isinstance(p, type(self)) for p in there)
        else:
            other = "a hook" if name not in layer._parameters else None
            twice = False
        if other:
            raise UserError(
                f"the {name} of {type(layer).__name__} is computed by {other}, as weight norms do, and cannot be "
                "compressed; make it a plain parameter first (torch.nn.utils.parametrize.remove_parametrizations, or "
                "torch.nn.utils.remove_weight_norm for the older kind), or exclude the layer"
            )
        if twice:
            raise UserError(
                f"the {name} of {type(layer).__name__} has a {type(self).__name__.lower()} already: a network is "
                "compressed once; begin from a fresh copy of it (copy.deepcopy before the first time)"
            )
        self.size_for_weight(weight)
        parametrize.register_parametrization(layer, name, self)
        chain = layer.parametrizations[name]  # type: ignore[index]
        if not isinstance(chain, WeightOperators):
            chain.__class__ = WeightOperators
            read_directly(layer, name)
        return layer

    def start_window(self) -> None:
        """Forget what was observed."""

    def end_windows(self) -> None:
        """Give back what a window takes: no event follows."""
        self.start_window()

    def size_for_weight(self, weight: Tensor) -> None:
        """Size the buffers by the weight that this operator will work on."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Masks and windows take their size from data: a fresh operator adopts the size it is given.
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape != buffer.shape:
                setattr(self, name, torch.empty(saved.shape, dtype=buffer.dtype, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
