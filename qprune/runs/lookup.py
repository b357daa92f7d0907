"""Where a run's row is: in its own folder, or published beside the results; and whether it is of the same data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import qprune
from qprune.config import signature as identity
from qprune.config.schema import RunConfig
from qprune.errors import UserError
from qprune.runs.folder import ENVIRONMENT_FILE, PUBLISHED, RunFolder
from qprune.runs.row import Row


def folder_of(config: RunConfig) -> RunFolder:
    """Return the folder that holds a run's row, or is to hold it.

    A published row counts as finished, as it does in tables, unless it was trained with another version of the
    arithmetic (`superseded`) or `force=true` is set.
    """
    own, published = _places(config)
    if own.finished or config.force or not published.finished or superseded(config):
        return own
    return published


def superseded(config: RunConfig) -> int | None:
    """Return the version of the arithmetic of a published row that this version of qprune trains again, if any."""
    own, published = _places(config)
    if own.finished or not published.finished or (version := published.row().arithmetic) == qprune.ARITHMETIC:
        return None
    return version


def float_row(config: RunConfig) -> Row | None:
    """Return the finished row of the float network with the same settings, if there is one."""
    baseline = identity.as_dict(config) | {"order": {"name": "baseline", "steps": []}}
    for folder in _places(baseline):
        if folder.finished and (row := folder.row()).signature == identity.signature(baseline):
            return row
    return None


def require_same_data(folder: RunFolder, dataset: Mapping[str, str]) -> None:
    """Raise UserError where a run was begun or finished on other data.

    dataset: checksum of the present data by name, as in `Task.dataset`.
    """
    then = folder.environment().dataset
    # Names that only one of them has came later than the run: what data a config names is part of its signature.
    if differing := sorted(name for name in then.keys() & dataset.keys() if then[name] != dataset[name]):
        raise UserError(
            f"{folder.path} is of other data: {' and '.join(differing)} of data.root are not what the run was trained "
            f"on (checksums in {ENVIRONMENT_FILE}); set data.root=FOLDER to that data, or type force=true to train "
            "again"
        )


def _places(config: identity.Config) -> tuple[RunFolder, RunFolder]:
    """Return a run's own folder, and that of its published row."""
    own, results_dir = identity.run_folder(config), Path(identity.as_dict(config)["results_dir"])
    return RunFolder(own), RunFolder(results_dir.parent / PUBLISHED / own.relative_to(results_dir))
