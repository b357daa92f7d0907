"""How optimizers take their step: in one pass over all parameters, and with little around that pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def fuse(optimizers: Mapping[str, Optimizer]) -> None:
    """Have optimizers that can take their step in one pass over all parameters do so."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            if "fused" in group:
                group["fused"], group["foreach"] = True, False


def shorten_steps(optimizers: Mapping[str, Optimizer]) -> None:
    """Have torch's own Adam and AdamW, if fused, go straight to their pass over all parameters, for the same bits.

    In a step of a few milliseconds, what torch asks before that pass takes longer than the pass. Whatever is not the
    usual case is left to torch, step by step: hooks, closures, other dtypes and devices, a parameter's first step.
    """
    for optimizer in optimizers.values():
        # A scheduler's own step stays where it is; one that comes later asks for a bound method.
        if type(optimizer) in (Adam, AdamW) and "step" not in vars(optimizer):
            optimizer.step = MethodType(_short(optimizer.step), optimizer)  # type: ignore[method-assign]
            optimizer.zero_grad = MethodType(_drop_gradients, optimizer)  # type: ignore[method-assign]


Pass = tuple[Callable[..., None], list[list[Any]], dict[str, Any]]


def _drop_gradients(optimizer: Adam, set_to_none: bool = True) -> None:
    if not set_to_none:
        type(optimizer).zero_grad(optimizer, set_to_none=False)
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _short(usual: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Adam, closure: Callable[[], float] | None = None) -> Any:
        passes = None if closure is not None or _is_watched(self) else _passes(self)
        if passes is None:
            return usual(closure)
        with torch.no_grad():
            for update, lists, numbers in passes:
                torch._foreach_add_(lists[-1], 1)
                update(*lists, **numbers)
        return None

    return step


def _is_watched(optimizer: Adam) -> bool:
    """Whether others are told of its steps or have a say in them: hooks, a scaler of gradients."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or getattr(optimizer, "grad_scale", None) is not None
        or getattr(optimizer, "found_inf", None) is not None
    )


def _passes(optimizer: Adam) -> list[Pass] | None:
    """Of each group of parameters the function, its lists of tensors and its numbers; None if one is unusual."""
    passes: list[Pass] = []
    for group in optimizer.param_groups:
        rate, (beta1, beta2) = group["lr"], group["betas"]
        if not group["fused"] or group["amsgrad"] or group["differentiable"] or type(rate) is not float:
            return None
        parameters, gradients, states = [], [], []
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            state = optimizer.state.get(parameter)
            if not state or not _is_plain(parameter) or not _is_plain(gradient):
                return None
            parameters.append(parameter)
            gradients.append(gradient)
            states.append(state)
        if not parameters:
            continue
        lists = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
        numbers = {name: group[name] for name in ("weight_decay", "eps", "amsgrad", "maximize")}
        numbers |= {"lr": rate, "beta1": beta1, "beta2": beta2}
        update = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        passes.append((update, [parameters, gradients, *lists[:2], [], lists[2]], numbers))
    return passes


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype is torch.float32 and tensor.layout is torch.strided
