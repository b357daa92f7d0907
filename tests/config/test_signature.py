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
        del section[name]
    for key in RETIRED:
        section, name = at(old, key)
        section[name] = True
    assert signature(old) == signature(config) == signature(checked)
    assert RunConfig.check(old).trainer == checked.trainer
