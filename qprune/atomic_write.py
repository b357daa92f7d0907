"""Write files so that a reader sees the old or the new content, never a part."""

from __future__ import annotations

import errno
import io
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qprune.errors import RunFailure, UserError, visible

_TEMPORARY = ".tmp"
# errors that another folder does not have; others are a disk's or a network's, and may pass
_UNFIT = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP),
}

if TYPE_CHECKING:  # the command line writes files too, and must not wait for torch
    import pandas as pd
    from torch import Tensor


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file, flush it, and rename it to `path`.

    The file has the permissions that the umask gives. The folder is flushed too, so that the new name survives a
    machine that loses power. Raises RunFailure for a full disk, UserError for a folder that cannot be written; the
    temporary file is removed.
    """
    # not tempfile's, whose files are readable by their owner alone, whatever the umask
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except BaseException as error:  # also of a signal
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise explained(error, path) from error
        raise


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
    """Remove what killed writers have left in `folder`; nobody may be writing there."""
    for path in folder.rglob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def explained(error: OSError, path: Path) -> Exception:
    """Return the error to show for an `OSError` while reading or writing `path`."""
    again = "start the same command again: it resumes from the last checkpoint"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFailure(
            f"no space is left on the disk to write {path}; free some, or choose another folder with results_dir=..., "
            f"and {again}"
        )
    if error.errno in _UNFIT:
        return UserError(f"{path} cannot be written ({error.strerror}); choose a folder that can, with results_dir=...")
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return RunFailure(
            f"{path} is gone ({error.strerror}): it was deleted, moved or unmounted; put back what was moved, and "
            f"{again} that is there"
        )
    return RunFailure(f"{path} cannot be read or written ({error.strerror}); once it can, {again}")


def png_bytes(picture: Tensor) -> bytes:
    """Return the content of a PNG file of a picture (3, H, W) in uint8."""
    content = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()).save(content, format="PNG")
    return content.getvalue()


def json_bytes(value: Any) -> bytes:
    """Return the content of a JSON file with sorted keys; ValueError for NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def csv_bytes(table: pd.DataFrame) -> bytes:
    """Return the content of a CSV file in which no text is a formula to a spreadsheet, and none has lines."""

    def cell(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return f"'{visible(value)}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else visible(value)

    return str(table.map(cell).to_csv(index=False, lineterminator="\n")).encode()


def own_place(folder: Path, name: str) -> Path:
    """Return where a command writes below `folder` without being told; UserError where a link leads elsewhere."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{path} is a link to {path.resolve()}, and nothing is written out of {folder} unless it is named: remove "
            "the link, or name a folder with --output"
        )
    return path


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON (`json_bytes`)."""
    write_atomically(path, json_bytes(value))
