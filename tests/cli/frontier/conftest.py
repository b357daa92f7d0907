"""What tests of searches share."""

from typing import Any

import pytest

from qprune.config.schema import RunConfig
from qprune.runs import execute as runner
from tests.cli.frontier.runs import scored, store


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are not trained: each stores a row with a made-up score, and its name and seed are noted."""
    names: list[str] = []

    def execute(cfg: RunConfig, wait: bool = False, watch: Any = None) -> None:
        assert wait
        row = store(cfg, scored(cfg))
        names.append(f"{row.notation} {row.seed}")

    monkeypatch.setattr(runner, "execute", execute)
    return names
