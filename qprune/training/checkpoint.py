"""Checkpoints: saved atomically, verified, and loaded without running code."""

import hashlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from qprune.atomic_write import write_atomically

KEPT = 2
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


def save(folder: Path, step: int, state: dict[str, Any], kept: int | None = KEPT) -> Path:
    """Write the checkpoint of `step`; its name holds the content's digest.

    The `kept` newest checkpoints stay (None: all). Raises RunFailure when the disk is full, with the older ones intact.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:09d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    write_atomically(path, content)
    for old in _newest_first(folder)[kept:] if kept is not None else ():
        try:
            old.unlink(missing_ok=True)
        except OSError as error:  # one checkpoint too many is no reason to stop
            warnings.warn(f"{old} cannot be removed ({error.strerror}); delete it by hand", stacklevel=2)
    return path


def load_newest(folder: Path, latest: int | None = None) -> dict[str, Any] | None:
    """Return the newest good checkpoint of up to step `latest`, on the CPU, or None.

    A damaged one is skipped with a warning. `weights_only=True`: a checkpoint from a stranger cannot run code.
    """
    for path in _newest_first(folder):
        if latest is not None and _step(path) > latest:
            continue
        try:
            return _load(path)
        except Exception as error:  # made-up content can fail in any way while it is unpickled
            why = " ".join(str(error).split())[:120]
            warnings.warn(f"{path} is damaged ({why}); the checkpoint before it is used", stacklevel=2)
    return None


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, the newest first."""
    return [_step(path) for path in _newest_first(folder)]


def _load(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    name = _NAME.fullmatch(path.name)
    if name is None or hashlib.sha256(content).hexdigest()[:16] != name[2]:
        raise ValueError("its checksum differs")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    return state


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _newest_first(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name) and path.is_file())
    return sorted(found, reverse=True)
