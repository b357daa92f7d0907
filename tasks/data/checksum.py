"""Checksums of data sets: of their decoded arrays, whatever their files, and of the files that were unpacked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qprune.errors import UserError

SUMS_FILE = "SHA256SUMS"  # in the folder of a set, as `qprune data get` leaves it


def checksum(arrays: Iterable[NDArray[np.generic]]) -> str:
    """Return the sha256 (hexadecimal) over type, shape and content of the arrays, in their order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def unpacked(*folders: Path) -> dict[str, str]:
    """Return the checksum of what `qprune data get` unpacked, for `Task.dataset`; nothing for other folders.

    Args:
        folders: Of pictures; the list of a set's files is in the folder above.

    Raises:
        UserError: A file is not as it was unpacked.
    """
    found = {}
    for folder in folders:
        try:
            content = (folder.parent / SUMS_FILE).read_bytes()
        except OSError:
            continue
        sums = dict(line.split("  ", 1)[::-1] for line in content.decode(errors="replace").splitlines() if "  " in line)
        for name in (name for name in sums if Path(name).parent == Path(folder.name)):
            path = folder.parent / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sums[name]:
                raise UserError(
                    f"{path} is not as qprune data get unpacked it; fetch the set again, or delete "
                    f"{folder.parent / SUMS_FILE} to take the files as they are"
                )
            found["unpacked"] = hashlib.sha256(content).hexdigest()
    return found
