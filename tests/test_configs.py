"""Every shipped config composes, resolves and is commented."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from qprune.cli.list import choices
from qprune.compression.config import TARGETS, WEIGHT_AXES
from qprune.compression.functional import GRADIENTS, MASK_RULES, ROUNDINGS
from qprune.compression.pruner import BORDERS, GRANULARITIES
from qprune.config.build import Recipe
from qprune.config.schema import keys
from qprune.config.signature import notation
from tests.faults.recipes import config_of

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted([*CONFIGS.rglob("*.yaml"), *CONFIGS.parent.glob("qprune/presets/**/*.yaml")])


def names(group: str) -> list[str]:
    return [name for name, _ in choices(group)]


PAPER_S = ("baseline", "prune_first", "prune_only", "quantize_first", "quantize_only")


@pytest.mark.parametrize("order", names("order"))
@pytest.mark.parametrize("task", names("task"))
def test_every_task_composes_in_every_order(task: str, order: str) -> None:
    config = config_of(f"task={task}", f"order={order}", f"protocol={'paper' if order in PAPER_S else 'factorial'}")
    assert config["task"]["name"] == task
    assert config["order"]["name"] == order
    recipe = Recipe.from_config(config)  # times in the order's order, within the epochs
    assert recipe.limits.epochs == config["epochs"]


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
    schedules = {
        order: Recipe.from_config(config_of(f"task={task}", f"order={order}", "protocol=factorial")).schedule
        for order in names("order")
        if order != "baseline"
    }
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


@pytest.mark.parametrize("order", ["prune_first", "quantize_first"])
@pytest.mark.parametrize("budget", ["short", "smoke"])
@pytest.mark.parametrize("task", names("task"))
def test_small_budgets_keep_every_phase_apart(task: str, budget: str, order: str) -> None:
    recipe = Recipe.from_config(config_of(f"task={task}", f"order={order}", f"budget={budget}"))
    recipe.schedule.check(recipe.config.order.steps, recipe.limits.epochs)
    assert recipe.limits.steps_per_epoch is not None
    timeline = recipe.schedule.in_steps(recipe.limits.steps_per_epoch)
    quantized = (timeline.weight_step, timeline.feature_step)
    events = [*timeline.prune_steps, *quantized] if order == "prune_first" else [*quantized, *timeline.prune_steps]
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
    """In the schema; a task's arguments, and what this project sets of Hydra's, beside their values."""
    assert [key for key, field in keys() if not field.description] == []
    known = {key.rpartition(".")[2] for key, _ in keys()}
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in keys_of_values(yaml.compose(path.read_text(encoding="utf-8"))):
            here, above = lines[node.start_mark.line], lines[node.start_mark.line - 1].strip()
            explained = node.value in known or "#" in here or above.startswith("#")
            assert explained, f"{path.name}:{node.start_mark.line + 1}: {here}"


def test_choices_of_the_schema_are_those_of_the_operators() -> None:
    kinds = {"targets": TARGETS, "granularity": GRANULARITIES, "rule": MASK_RULES, "border": BORDERS}
    kinds |= {"rounding": ROUNDINGS, "gradient": GRADIENTS, "weight_axis": WEIGHT_AXES}
    for key, field in keys():
        if key.startswith(("prune.", "quantize.")) and (legal := kinds.get(key.partition(".")[2])):
            assert get_args(field.annotation) == tuple(legal), key


def keys_of_values(node: yaml.Node | None) -> list[yaml.Node]:
    """The nodes of all keys whose values are no sections."""
    found: list[yaml.Node] = []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if isinstance(value, yaml.MappingNode):
            found += keys_of_values(value) if key.value not in ("hydra",) else []
        elif key.value not in ("_target_", "defaults"):
            found.append(key)
    return found
