"""Configs that are composed quickly are those that Hydra composes, and their signatures those of whole configs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from qprune.cli import main as cli
from qprune.config import signature as identity
from qprune.config.compose import CONFIG_MODULE, CONFIG_NAME, VERSION_BASE
from qprune.config.compose_many import Composer

CHOICES = [[f"task={task}", f"order={order}"] for task in ("espcn", "cifar") for order in ("baseline", "prune_first")]
SEED_ELSEWHERE = ["task=espcn", "order=prune_first", "+task.further_seed=${seed}"]


def test_configs_are_those_that_hydra_composes() -> None:
    with Composer() as composer:
        ours = [composer.config(words) for words in [*CHOICES, *CHOICES[::-1]]]
    with initialize_config_module(config_module=CONFIG_MODULE, **VERSION_BASE):
        theirs = [compose(CONFIG_NAME, overrides=words) for words in [*CHOICES, *CHOICES[::-1]]]
    assert ours == theirs


def test_files_of_a_folder_given_later_count(tmp_path: Path) -> None:
    (tmp_path / "budget").mkdir()
    (tmp_path / "budget" / "own.yaml").write_text(
        "name: own\nepochs: 3\nsteps_per_epoch: 2\nbatch_size: null\ntest_samples: null\n", encoding="utf-8"
    )
    with Composer(str(tmp_path)) as composer:
        assert composer.config(["task=espcn", "budget=own"]).budget.epochs == 3
        assert composer.config(["task=espcn", "budget=paper"]).budget.epochs is None


@pytest.mark.parametrize("overrides", [CHOICES[1], SEED_ELSEWHERE], ids=["own", "seed_elsewhere"])
@pytest.mark.parametrize("source", [None, "ab" * 32])
def test_a_signature_is_that_of_the_whole_config(overrides: list[str], source: str | None) -> None:
    with Composer() as composer:
        for seed in (3, 11, 3):
            config = composer.config([*overrides, f"seed={seed}"])
            config.quantize.decimal_from = source
            assert composer.signature(overrides, seed, source) == identity.signature(config)
        assert composer.config(overrides).seed == 0


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("report", ["task=espcn", "--runs", "4", "results_dir={}"]),
        ("tables", ["3", "--output", "{}", "task=espcn", "results_dir={}"]),
        ("frontier", ["task=espcn", "--plan", "data=synthetic", "budget=smoke", "results_dir={}"]),
        ("plan", ["task=espcn", "--config-dir", "{}", "data=synthetic", "results_dir={}"]),
        ("run", ["task=espcn", "--cfg", "job", "data=synthetic", "results_dir={}"]),
    ],
)
def test_keys_may_stand_on_both_sides_of_an_option(
    verb: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, *(word.format(tmp_path) for word in words)]) == 0, capsys.readouterr().err
