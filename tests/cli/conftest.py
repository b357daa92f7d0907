"""What tests of the command line share."""

from typing import Any

import pytest

from qprune.config.schema import RunConfig
from qprune.errors import RunFailure
from qprune.runs import execute as runner


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs are not carried out: what each was asked for is noted. One with `seed: 13` fails."""
    runs: list[dict[str, Any]] = []

    def execute(cfg: RunConfig, wait: bool = False) -> None:
        runs.append({"task": cfg.task.name, "order": cfg.order.name, "seed": cfg.seed})
        if cfg.seed == 13:
            raise RunFailure("the loss is not finite at step 7")

    monkeypatch.setattr(runner, "execute", execute)
    return runs
