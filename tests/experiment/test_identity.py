"""Rows stay what they are: signatures of published runs do not change when keys are added."""

from __future__ import annotations

import pytest

from qprune.command_line.overrides import Composer


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
