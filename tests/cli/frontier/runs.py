"""Searches for tests: small ones on ESPCN, and rows with made-up scores."""

from pathlib import Path
from typing import Any

import pandas as pd

from qprune.config.schema import RunConfig
from qprune.runs.row import Row
from qprune.search.size import planned_footprint, task_of
from qprune.training.task import Task
from tests.reporting.rows import store_row_of

SMOKE = ["task=espcn", "data=synthetic", "budget=smoke", "trainer.threads=1"]
# The last event is in the middle, so that there are epochs behind it to judge by.
SHORT = ["budget.epochs=12", "budget.steps_per_epoch=6", "budget.test_samples=2"]
EARLY = ["schedule.t_p=40", "schedule.dt_p=10", "schedule.t_qw=90", "schedule.t_qf=100"]
SMALL = ["bits=4,8", "sparsity=0,0.5"]
TASKS: dict[str, Task] = {}


def scored(cfg: RunConfig) -> float:
    """A made-up PSNR: 30 dB, less 2 for 4 bits, less the sparsity; seeds differ by 0.1 dB."""
    names = str(cfg.order.name)
    bits = 32 if names in ("baseline", "prune_only") else cfg.quantize.bits
    zeros = 0.0 if names in ("baseline", "quantize_only") else cfg.prune.sparsity
    return 30.0 - (2.0 if bits == 4 else 0.0) - zeros + 0.1 * cfg.seed


def store(cfg: RunConfig, score: float, **changes: Any) -> Row:
    """Store the row of a run without training, with the size that it would have."""
    if cfg.task.name not in TASKS:
        TASKS[cfg.task.name] = task_of(cfg)
    footprint = planned_footprint(TASKS[cfg.task.name], cfg)
    sizes = {f"{kind}_bits_actual": footprint.size_bits(kind) for kind in ("weight", "feature", "input")}
    return store_row_of(cfg, **({"score": score} | sizes | changes))


def table_in(folder: Path) -> pd.DataFrame:
    [path] = (folder / "frontier").glob("*.csv")
    return pd.read_csv(path).set_index("model")
