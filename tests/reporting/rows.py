"""Stored rows for tests of tables, comparisons and reports: made from real configs, without training."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import qprune
from qprune.atomic_write import write_json
from qprune.config import signature as identity
from qprune.config.compose import Composer
from qprune.runs.folder import ROW_FILE
from qprune.runs.row import Row

FIELDS: dict[str, Any] = {
    "schema_version": 1,
    "signature": "0123456789abcdef" * 4,
    "task": "espcn",
    "order": "prune_first",
    "notation": "P0.5(w,f)->Q8(w,f)",
    "seed": 0,
    "metric": "psnr_db",
    "score": 30.0,
    "higher_is_better": True,
    "epochs": 200,
    "steps": 64,
    "budget": "paper",
    "data_source": "real",
    "marks": [],
    "weight_sparsity": 0.5,
    "feature_sparsity": 0.5,
    "metrics": {},
    **{f"{kind}_bits_{name}": 1e6 for kind in ("weight", "feature", "input") for name in ("paper", "actual")},
    "density_paper": 8.0,
    "density_actual": 9.0,
}


def store_row(composer: Composer, overrides: Sequence[str], folder: Path, **changes: Any) -> Row:
    """Write the row and config of a finished run with these overrides below `folder`."""
    return store_row_of(composer.config([*overrides, f"results_dir={folder}"]), **changes)


def store_row_of(config: Any, **changes: Any) -> Row:
    """Write the row and config of a finished run of this config."""
    own = {
        "signature": identity.signature(config),
        "task": config.task.name,
        "order": config.order.name,
        "notation": identity.notation(config),
        "seed": config.seed,
        "epochs": config.budget.epochs or config.epochs,
        "budget": config.budget.name,
        "data_source": config.data.source,
        "arithmetic": qprune.ARITHMETIC,
    }
    row = Row(**(FIELDS | own | changes))
    place = identity.run_folder(config)
    write_json(place / ROW_FILE, asdict(row))
    text = yaml.safe_dump(identity.as_dict(config), sort_keys=False)
    (place / "config.yaml").write_text(text, encoding="utf-8")
    return row
