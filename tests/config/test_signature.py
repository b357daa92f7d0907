"""Rows stay what they are: signatures of published runs do not change when keys are added, renamed or retired."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qprune.config.build import Recipe
from qprune.config.compose import Composer
from qprune.config.schema import LATER_KEYS, RETIRED, RunConfig
from qprune.config.signature import run_folder, signature

PUBLISHED = Path(__file__).parents[2] / "results" / "published"


def test_every_published_row_has_the_signature_of_its_config() -> None:
    paths = sorted(PUBLISHED.rglob("config.yaml"))
    assert len(paths) >= 165
    for path in paths:
        stored = yaml.safe_load(path.read_text())
        config = RunConfig.check(stored)
        row = json.loads(path.with_name("result.json").read_text())
        assert row["signature"] == signature(stored) == signature(config), path
        assert run_folder(config).name == path.parent.name
        assert Recipe.from_config(config).config.plain()["task"] == stored["task"]


@pytest.mark.parametrize(("seed", "begins"), [(0, "2ef7b5f833"), (1, "eae16f8883")])
def test_a_recipe_composed_today_is_the_published_run(seed: int, begins: str) -> None:
    recipe = ["task=espcn", "order=quantize_first", "prune.targets=w"]
    with Composer() as composer:
        found = composer.signature([*recipe, "task.further_test_folders=[]"], seed)
        assert found == composer.signature([*recipe, "trainer.warm_start=false"], seed)
        assert composer.signature([*recipe, "task.further_test_folders=[set14]"], seed) != found
    assert found.startswith(begins)


def at(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section of a dotted key, and its name there."""
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    return config, name


def test_later_and_retired_keys_change_no_run() -> None:
    with Composer() as composer:
        config = composer.config(["task=espcn", "order=prune_first"])
    checked = RunConfig.check(Recipe.from_config(config).config.plain())
    old = copy.deepcopy(checked.plain())
    for key in LATER_KEYS:
        section, name = at(old, key)
        section.pop(name, None)  # an argument may be another task's
    for key in RETIRED:
        section, name = at(old, key)
        section[name] = True
    assert signature(old) == signature(config) == signature(checked)
    assert RunConfig.check(old).trainer == checked.trainer


def test_a_protocol_is_no_part_of_what_a_run_is() -> None:
    """A run of both protocols is trained once; the paper's and a baseline stay what they are."""
    with Composer() as composer:

        def named(*words: str) -> str:
            return composer.signature(["task=espcn", *words], 0)

        for order in ("prune_first", "quantize_first", "quantize_only"):
            mirrored, factorial, paper = (
                named(f"order={order}", f"protocol={name}") for name in ("mirrored", "factorial", "paper")
            )
            assert mirrored == factorial != paper == named(f"order={order}")
        assert named("order=baseline", "protocol=mirrored") == named("order=baseline")
        alone = [named(f"order={name}", "protocol=factorial") for name in ("quantize_only", "quantize_only_late")]
        assert len({*alone}) == 2
        few = named("order=prune_only_late", "protocol=factorial", "quantize.bits=4")
        assert few == named("order=prune_only_late", "protocol=factorial")
