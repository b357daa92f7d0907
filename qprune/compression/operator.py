"""What Pruner and Quantizer share: modes set by a compressor, placement on weights, and buffers sized by data."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from qprune.errors import UserError

LayerT = TypeVar("LayerT", bound=nn.Module)


class Operator(nn.Module):
    """A module that owns numbers (buffers) but never time: a `Compressor` sets its modes.

    What it is in evaluation follows from its buffers alone, which keep their sizes once the network is prepared: a
    network that is loaded, copied, averaged or moved does what the original did.

    Attributes:
        active: Whether it changes its input; otherwise it is the identity. None in a copy that no compressor drives:
            then `updates` decides, without a host sync.
        observing: Whether it collects the statistics for its next event, while the network is in training mode.
        first_sample: Position of this process's batch in the global batch; set with `observing`.
        sample_limit: Number of leading samples of this process's batch that belong to the window (spec 2.3), or None
            for all; set with `observing`.
        updates: Buffer, number of events that have fired; the operator acts from the first one on. A float, as all
            buffers are, so that an average over training (EMA, SWA) that includes buffers has it too.
        order: Names of the layer's parameters in the order that they have in the float network (weights only).
        window: What was observed since `start_window`, or None. No buffer: its size changes, and data parallel
            training would overwrite it with rank 0's. `Compressor.state_dict` saves it.
    """

    updates: Tensor
    window: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.active: bool | None = False
        self.observing = False
        self.window = None
        self.first_sample = 0
        self.sample_limit: int | None = None
        # The compressed network, in a tuple so that it is not a submodule. Its mode decides about observation: an
        # operator inside a frozen norm is always in evaluation mode, and has to observe all the same.
        self.owner: tuple[nn.Module, ...] = ()
        self.order: tuple[str, ...] = ()
        self.register_buffer("updates", torch.zeros(()))
        self.register_load_state_dict_pre_hook(_adopt_sizes)
        self.register_load_state_dict_post_hook(_adopt_mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, by copy.deepcopy or pickle
        self.active = None

    @property
    def acts(self) -> bool:
        """Whether it changes its input, also where no compressor drives it; may wait for the device."""
        return bool(self.updates > 0) if self.active is None else self.active

    @property
    def averaged(self) -> bool:
        """Whether buffers may hold averages: those of a copy, or swapped in for evaluation."""
        return self.active is None or not self.training

    @torch.no_grad()
    def settle(self) -> None:
        """Replace averages in buffers by the values that they stand for."""
        self.updates.ceil_()

    @property
    def collecting(self) -> bool:
        """Whether the input of this call is observed."""
        return self.observing and (self.owner[0].training if self.owner else self.training)

    def in_window(self, x: Tensor) -> Tensor:
        """Return the samples of this call, (B, ...), that belong to the window."""
        x = x.detach()
        return x if self.sample_limit is None else x[: self.sample_limit]

    def on(self, layer: LayerT, name: str = "weight") -> LayerT:
        """Place this operator on `layer.weight`, after the operators that are there.

        `Quantizer(8).on(Pruner(0.5).on(nn.Conv2d(3, 8, 3)))` is the paper's Listing 1.

        Args:
            layer: A module with a parameter `name`.
            name: The parameter, of two or more dimensions.

        Returns:
            The layer.

        Raises:
            UserError: There is no such parameter, something else computes it, or it has such an operator already.
        """
        if isinstance(layer, nn.RNNBase):
            raise UserError(
                f"{type(layer).__name__} reads its weights past all operators; build it of {type(layer).__name__}Cell, "
                "whose weights take them, or exclude it"
            )
        weight = getattr(layer, name, None)
        if not isinstance(weight, Tensor) or weight.dim() < 2:
            raise UserError(f"{type(layer).__name__} has no {name} of two or more dimensions to place an operator on")
        placed: list[nn.Module] = []
        if parametrize.is_parametrized(layer, name):
            placed = list(layer.parametrizations[name])  # type: ignore[index]
            other = next((type(each).__name__ for each in placed if not isinstance(each, Operator)), None)
        else:
            other = None if name in dict(layer.named_parameters(recurse=False)) else "a hook"
        kind = type(layer).__name__.removeprefix("Parametrized")
        if prune.is_pruned(layer):
            raise UserError(
                f"the {name} of {kind} is masked by torch.nn.utils.prune; make it plain, "
                f"torch.nn.utils.prune.remove(layer, {name!r}), and keep its zeros, PruneConfig(keep_zeros=True)"
            )
        if other:
            raise UserError(
                f"the {name} of {kind} is computed by {other}, as weight norms do, and cannot be compressed; make it a "
                "plain parameter first (torch.nn.utils.parametrize.remove_parametrizations, or "
                "torch.nn.utils.remove_weight_norm for the older kind), or exclude the layer"
            )
        if any(isinstance(each, type(self)) for each in placed):
            raise UserError(
                f"the {name} of {kind} has a {type(self).__name__.lower()} already: a network is "
                "compressed once; begin from a fresh copy of it (copy.deepcopy before the first time)"
            )
        self.size_for_weight(weight)
        self.order = tuple(name for name, _ in layer.named_parameters(recurse=False))
        parametrize.register_parametrization(layer, name, self)
        return layer

    @property
    def facts(self) -> dict[str, Any]:
        """What sizes and costs depend on, as plain values, which `convert` leaves on the module."""
        return {}

    def start_window(self) -> None:
        """Discard what was observed; called at the first step of a window and after its event."""
        self.window = None

    def clear_window(self) -> None:
        """Go on with a window of which another rank carries what was observed so far."""
        self.window = None

    def size_for_weight(self, weight: Tensor) -> None:
        """Size the buffers by the weight that this operator will work on."""


_OLD_BUFFERS = ("total", "kept")  # windows in states that were saved up to version 0.1


def _adopt_sizes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
    """Give a fresh operator, whose buffers are sized by data, the sizes of what is loaded."""
    for name in _OLD_BUFFERS:
        state_dict.pop(prefix + name, None)
    for name, buffer in module.named_buffers(recurse=False):
        saved = state_dict.get(prefix + name)
        if saved is None or saved.shape == buffer.shape:
            continue
        if not buffer.numel() or not buffer.dim() or saved.dim() == buffer.dim():
            setattr(module, name, torch.empty(saved.shape, dtype=buffer.dtype, device=buffer.device))


def _adopt_mode(module: nn.Module, incompatible_keys: Any) -> None:
    """Have an operator act after loading a state if it acted when that was saved."""
    assert isinstance(module, Operator)
    if module.active is not None:
        module.settle()
        module.active = bool(module.updates > 0)
