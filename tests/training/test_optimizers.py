"""How optimizers take their step: the same bits with less around it, and torch's own step where anything is unusual."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from qprune.training.optimizers import fuse, shorten_steps


def layers() -> list[nn.Parameter]:
    """Parameters of several shapes, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2, 3, 3), (3,), (5, 7))]


def step(optimizer: Optimizer, seed: int, without: int | None = None) -> None:
    """One step on random gradients, which the parameter `without` has none of."""
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for at, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if at != without:
            parameter.grad = gradient
    optimizer.step()


def numbers(optimizer: Optimizer) -> list[Tensor]:
    """All that an optimizer changes."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    state = [value for each in parameters for value in optimizer.state.get(each, {}).values()]
    return [each.detach() for each in parameters] + state


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever torch's own way to Adam's pass is taken."""
    calls: list[int] = []
    module = import_module("torch.optim.adam")
    usual = module.adam

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        usual(*args, **kwargs)

    monkeypatch.setattr(module, "adam", counted)
    return calls


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from([Adam, AdamW]),
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-3, 0.5]),
            "betas": st.sampled_from([(0.9, 0.999), (0.5, 0.9)]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "maximize": st.booleans(),
            "amsgrad": st.booleans(),
        }
    ),
    groups=st.booleans(),
    missing=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=3, max_size=6),
)
def test_short_steps_have_torch_s_bits(
    kind: type[Adam], options: dict[str, Any], groups: bool, missing: list[int | None]
) -> None:
    found = []
    for short in (False, True):
        parameters = layers()
        parts: Any = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.1}] if groups else parameters
        optimizer = kind(parts, fused=True, **options)
        if short:
            shorten_steps({"adam": optimizer})
        for seed, without in enumerate(missing):
            if seed == 2:  # as a run that goes on does
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer.param_groups[0]["lr"] *= 0.1
            step(optimizer, seed, without)
        found.append([*numbers(optimizer), torch.tensor(sorted(optimizer.state_dict()["state"]))])
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))


def test_only_a_parameter_s_first_step_goes_by_torch(asked: list[int]) -> None:
    optimizer = Adam(layers(), fused=True)
    shorten_steps({"adam": optimizer})
    step(optimizer, 0, without=1)
    assert len(asked) == 1
    step(optimizer, 1, without=1)
    assert len(asked) == 1
    step(optimizer, 2)  # the first of parameter 1
    step(optimizer, 3)
    assert len(asked) == 2


@pytest.mark.parametrize(
    "options", [{"fused": False}, {"fused": True, "amsgrad": True}, {"fused": True, "lr": torch.tensor(0.1)}], ids=str
)
def test_what_is_unusual_goes_by_torch(options: dict[str, Any], asked: list[int]) -> None:
    optimizer = Adam(layers(), **options)
    shorten_steps({"adam": optimizer})
    for seed in range(3):
        step(optimizer, seed)
    assert len(asked) == 3


def test_parameters_of_another_type_go_by_torch(asked: list[int]) -> None:
    optimizer = Adam([nn.Parameter(torch.ones(3, dtype=torch.float64))], fused=True)
    shorten_steps({"adam": optimizer})
    for seed in range(3):
        step(optimizer, seed)
    assert len(asked) == 3


def test_hooks_and_closures_are_called_once_a_step() -> None:
    optimizer = Adam(layers(), fused=True)
    shorten_steps({"adam": optimizer})
    step(optimizer, 0)
    called: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: called.append("before")),
        optimizer.register_step_post_hook(lambda *_: called.append("after")),
    ]
    step(optimizer, 1)
    assert called == ["before", "after"]
    for handle in handles:
        handle.remove()
    step(optimizer, 2)
    assert called == ["before", "after"]

    def closure() -> float:
        called.append("closure")
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert called == ["before", "after", "closure"]


def test_gradients_are_dropped_or_made_zero() -> None:
    optimizer = Adam(layers(), fused=True)
    shorten_steps({"adam": optimizer})
    step(optimizer, 0)
    optimizer.zero_grad(set_to_none=False)
    parameters = optimizer.param_groups[0]["params"]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters)


def test_schedulers_see_steps() -> None:
    for before in (False, True):
        optimizer = Adam(layers(), lr=0.5, fused=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1) if before else None
        shorten_steps({"adam": optimizer})
        scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 1)
        for seed in range(2):
            step(optimizer, seed)
            scheduler.step()  # warns, which is an error here, if it saw no step
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_other_optimizers_are_left_alone() -> None:
    class Own(Adam):
        pass

    for optimizer in (SGD(layers(), lr=0.1), Own(layers())):
        shorten_steps({"one": optimizer})
        assert "step" not in vars(optimizer)
        assert "zero_grad" not in vars(optimizer)


def test_optimizers_that_can_are_fused() -> None:
    optimizers = {"adam": Adam(layers()), "sgd": SGD(layers(), lr=0.1), "rprop": torch.optim.Rprop(layers())}
    fuse(optimizers)
    assert [group.get("fused") for each in optimizers.values() for group in each.param_groups] == [True, True, None]
