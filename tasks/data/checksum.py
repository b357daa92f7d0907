"""A hash of a data set's decoded arrays, independent of their files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def checksum(arrays: Iterable[NDArray[np.generic]]) -> str:
    """Return the sha256 (hexadecimal) over type, shape and content of the arrays, in their order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
