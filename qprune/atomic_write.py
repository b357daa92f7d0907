"""Writing files so that a reader sees the old content or the new one, and never a part."""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qprune.errors import RunFailure, UserError

_TEMPORARY = ".tmp"

if TYPE_CHECKING:  # the command line writes files too, and must not wait for torch
    from torch import Tensor


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, flush it to the disk and rename it into place.

    The folder is flushed too, so that the new name survives a machine that loses power. Raises RunFailure for a full
    disk, UserError for a folder that cannot be written; the temporary file is removed.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise explained(error, path) from error


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def remove_left_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left in `folder` and below; nobody may be writing there now."""
    for path in folder.rglob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def explained(error: OSError, path: Path) -> Exception:
    """The error that a user is shown for an `OSError` while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFailure(
            f"no space is left on the disk to write {path}; free some, or choose another folder with results_dir=..., "
            "and start the same command again: it resumes from the last checkpoint"
        )
    return UserError(f"{path} cannot be written ({error.strerror}); choose a folder that can, with results_dir=...")


def png_bytes(picture: Tensor) -> bytes:
    """A picture (3, H, W) in uint8 as the content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()).save(content, format="PNG")
    return content.getvalue()


def json_bytes(value: Any) -> bytes:
    """`value` as the content of a JSON file with sorted keys; NaN and infinity are refused (ValueError)."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON (`json_bytes`)."""
    write_atomically(path, json_bytes(value))
