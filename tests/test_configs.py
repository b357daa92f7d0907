"""Every shipped config composes, resolves and is commented."""

import itertools
import re
from pathlib import Path
from typing import get_args

import pytest

from qprune.cli.list import choices
from qprune.compression.config import TARGETS, WEIGHT_AXES
from qprune.compression.functional import GRADIENTS, MASK_RULES, ROUNDINGS
from qprune.compression.pruner import BORDERS, GRANULARITIES
from qprune.config.build import Recipe
from qprune.config.compose import Composer
from qprune.config.schema import keys
from qprune.config.signature import notation
from tests.faults.recipes import config_of

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted([*CONFIGS.rglob("*.yaml"), *CONFIGS.parent.glob("qprune/presets/**/*.yaml")])


def names(group: str) -> list[str]:
    return [name for name, _ in choices(group)]


PAPER_S = ("baseline", "prune_first", "prune_only", "quantize_first", "quantize_only")


@pytest.mark.parametrize("task", names("task"))
def test_every_task_composes_in_every_order(task: str) -> None:
    with Composer() as composer:
        for order in names("order"):
            protocol = "paper" if order in PAPER_S else "factorial"
            config = composer.checked([f"task={task}", f"order={order}", f"protocol={protocol}"])
            assert (config.task.name, config.order.name) == (task, order)
            recipe = Recipe.from_config(config)  # times in the order's order, within the epochs
            assert recipe.limits.epochs == config.epochs


def test_orders_are_the_paper_s_rows() -> None:
    assert {order: notation(config_of(f"order={order}")) for order in PAPER_S} == {
        "baseline": "Baseline",
        "quantize_only": "Q8(w,f)",
        "prune_only": "P0.5(w,f)",
        "prune_first": "P0.5(w,f)->Q8(w,f)",
        "quantize_first": "Q8(w,f)->P0.5(w,f)",
    }


@pytest.mark.parametrize("task", names("task"))
def test_mirrored_orders_have_the_same_events(task: str) -> None:
    """Learning rates follow from the epoch, so that what is left after these events is the same too."""
    schedules = {}
    with Composer() as composer:
        for order in (name for name in names("order") if name != "baseline"):
            config = composer.checked([f"task={task}", f"order={order}", "protocol=factorial"])
            schedules[order] = Recipe.from_config(config).schedule
    pruned = {
        order: (each.prune_times[0], each.prune_times[-1]) for order, each in schedules.items() if each.prune_times
    }
    quantized = {order: each.quantize_times for order, each in schedules.items() if each.quantize_times}
    first, second = pruned["prune_first"], pruned["quantize_first"]
    assert (quantized["quantize_first"], quantized["prune_first"]) == (first, second)
    assert first[1] <= second[0]
    assert pruned == {
        **dict.fromkeys(("prune_first", "joint", "prune_only"), first),
        **dict.fromkeys(("quantize_first", "joint_late", "prune_only_late"), second),
    }
    assert quantized == {
        **dict.fromkeys(("quantize_first", "joint", "quantize_only"), first),
        **dict.fromkeys(("prune_first", "joint_late", "quantize_only_late"), second),
    }


@pytest.mark.parametrize("task", names("task"))
def test_small_budgets_keep_every_phase_apart(task: str) -> None:
    with Composer() as composer:
        for budget, order in itertools.product(("short", "smoke"), ("prune_first", "quantize_first")):
            config = composer.checked([f"task={task}", f"order={order}", f"budget={budget}"])
            phases_are_apart(Recipe.from_config(config))


def phases_are_apart(recipe: Recipe) -> None:
    recipe.schedule.check(recipe.config.order.steps, recipe.limits.epochs)
    assert recipe.limits.steps_per_epoch is not None
    timeline = recipe.schedule.in_steps(recipe.limits.steps_per_epoch)
    quantized = (timeline.weight_step, timeline.feature_step)
    prune_first = recipe.config.order.name == "prune_first"
    events = [*timeline.prune_steps, *quantized] if prune_first else [*quantized, *timeline.prune_steps]
    assert events == sorted(events)  # type: ignore[type-var]
    assert len({*timeline.prune_steps}) == 4
    assert len({*quantized}) == 2
    assert events[-1] < recipe.limits.steps_per_epoch * recipe.limits.epochs  # type: ignore[operator]


def test_budgets_limit_what_they_say() -> None:
    limits = {name: config_of(f"budget={name}")["budget"] for name in names("budget")}
    none = {"epochs": None, "steps_per_epoch": None, "batch_size": None, "test_samples": None}
    assert limits == {
        "cpu": {"name": "cpu", **none, "epochs": 25},
        "paper": {"name": "paper", **none},
        "short": {"name": "short", **none, "epochs": 10, "steps_per_epoch": 40, "test_samples": 2000},
        "smoke": {"name": "smoke", "epochs": 4, "steps_per_epoch": 16, "batch_size": 32, "test_samples": 64},
    }


def test_data_root_is_the_environment_s_or_the_folder_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QPRUNE_DATA", raising=False)
    assert config_of("data=real")["data"] == {"source": "real", "root": "data", "verify": True, "validation": 0.0}
    monkeypatch.setenv("QPRUNE_DATA", "/somewhere")
    assert config_of("data=real")["data"] == {"source": "real", "root": "/somewhere", "verify": True, "validation": 0.0}
    assert config_of("data=synthetic")["data"] == {
        "source": "synthetic",
        "root": None,
        "verify": True,
        "validation": 0.0,
    }


def test_feature_bits_follow_bits_unless_set() -> None:
    assert config_of("quantize.bits=4")["quantize"]["feature_bits"] == 4
    assert config_of("quantize.bits=4", "quantize.feature_bits=12")["quantize"]["feature_bits"] == 12


def test_every_choice_says_in_its_first_line_what_it_is() -> None:
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert re.match("# .{9}", next(line for line in lines if not line.startswith("# @"))), path


def test_every_key_is_explained() -> None:
    """In the schema; tests/docs/test_extensions holds a task's arguments and their comments."""
    assert [key for key, field in keys() if not field.description] == []


def test_choices_of_the_schema_are_those_of_the_operators() -> None:
    kinds = {"targets": TARGETS, "granularity": GRANULARITIES, "rule": MASK_RULES, "border": BORDERS}
    kinds |= {"rounding": ROUNDINGS, "gradient": GRADIENTS, "weight_axis": WEIGHT_AXES}
    for key, field in keys():
        if key.startswith(("prune.", "quantize.")) and (legal := kinds.get(key.partition(".")[2])):
            assert get_args(field.annotation) == tuple(legal), key
