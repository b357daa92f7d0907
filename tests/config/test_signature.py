"""Rows stay what they are: signatures of published runs do not change when keys are added."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from qprune.config.build import Recipe
from qprune.config.compose_many import Composer
from qprune.config.signature import LATER_KEYS, plain, signature


@pytest.mark.parametrize(
    ("overrides", "seed", "begins"),
    [
        (("order=quantize_first", "prune.targets=w"), 0, "2ef7b5f833"),
        (("order=quantize_first", "prune.targets=w"), 1, "eae16f8883"),
    ],
)
def test_the_signature_of_a_published_run_is_what_it_was(overrides: tuple[str, ...], seed: int, begins: str) -> None:
    with Composer() as composer:
        found = composer.signature(["task=espcn", *overrides, "task.further_test_folders=[]"], seed)
        assert found == composer.signature(["task=espcn", *overrides, "trainer.share_stem=false"], seed)
        assert composer.signature(["task=espcn", *overrides, "task.further_test_folders=[set14]"], seed) != found
    assert found.startswith(begins)


def at(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The section of a dotted key, and its name there."""
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    return config, name


def test_a_config_of_before_all_later_keys_is_the_same_run_and_still_works() -> None:
    with Composer() as composer:
        config = composer.config(["task=espcn", "order=prune_first"])
    stored = plain(config)
    for key in LATER_KEYS:
        section, name = at(stored, key)
        del section[name]
    assert signature(OmegaConf.create(stored)) == signature(config)
    Recipe.from_config(stored)
    for key, before in LATER_KEYS.items():
        if not key.startswith("task."):  # a task's own constructor has a default
            section, name = at(stored, key)
            assert section[name] == before
