"""Where a task's data comes from: a folder, or memory."""

from __future__ import annotations

from pathlib import Path

from qprune.errors import UserError, one_of
from qprune.training.task import DataOptions


def real_root(data: DataOptions, holds: str) -> Path | None:
    """Return the folder of real data; None for synthetic data.

    Args:
        data: The keys `data.*`.
        holds: What the folder must hold, for the message.

    Raises:
        UserError: The source is unknown, or real data has no folder.
    """
    one_of("data.source", data.source, ("real", "synthetic"))
    if data.source == "synthetic":
        return None
    if data.root is None:
        raise UserError(f"data.root is not set; give the folder that holds {holds}, or type data=synthetic")
    return Path(data.root)
