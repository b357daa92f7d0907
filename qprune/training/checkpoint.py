"""Everything a run needs to go on as if it had never stopped: saved atomically, verified, loaded without code."""

from __future__ import annotations

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
    """Write `state` (tensors and plain values) as the checkpoint of `step`; the name carries the content's digest.

    The `kept` newest checkpoints stay (None: all). Raises RunFailure when the disk is full, with the older ones intact.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{step:09d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    write_atomically(path, content)
    for old in _newest_first(folder)[kept:] if kept is not None else ():
        old.unlink(missing_ok=True)
    return path


def load_newest(folder: Path, device: torch.device | str = "cpu", latest: int | None = None) -> dict[str, Any] | None:
    """The newest checkpoint whose content matches its digest, or None; a damaged one is passed over with a warning.

    latest: the last step that a checkpoint may be of.

    Loaded with `weights_only=True`: a checkpoint from a stranger cannot run code.
    """
    for path in _newest_first(folder):
        if latest is not None and _step(path) > latest:
            continue
        try:
            return _load(path, device)
        except Exception as error:  # what is made up can fail in any way while it is unpickled
            why = " ".join(str(error).split())[:120]
            warnings.warn(f"{path} is damaged ({why}); the checkpoint before it is used", stacklevel=2)
    return None


def _load(path: Path, device: torch.device | str) -> dict[str, Any]:
    content = path.read_bytes()
    digest = _NAME.fullmatch(path.name)
    if digest is None or hashlib.sha256(content).hexdigest()[:16] != digest[2]:
        raise ValueError("its checksum differs")
    state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    return state


def steps(folder: Path) -> list[int]:
    """The steps that `folder` holds checkpoints of, the newest first."""
    return [_step(path) for path in _newest_first(folder)]


def _step(path: Path) -> int:
    return int(path.name.split("-")[1])


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)), reverse=True)
