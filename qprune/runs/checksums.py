"""Checksums of a finished run's files, so that one that was edited, mixed up or damaged later is noticed.

They stand in the run folder in the format of the tool `sha256sum`, which can check them too: sha256sum -c SHA256SUMS
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qprune.atomic_write import write_atomically
from qprune.errors import UserError

SUMS_FILE = "SHA256SUMS"
ADVICE = "delete the run's folder, or run its command again with force=true"
_BLOCK = 2**16  # bytes
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def write_sums(folder: Path, names: Sequence[str], **to_come: bytes) -> None:
    """Write the checksums of the files `names` of `folder`, and of files that are written next, given by content."""
    contents = {name: (folder / name).read_bytes() for name in names} | to_come
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in sorted(contents)]
    write_atomically(folder / SUMS_FILE, "".join(lines).encode())


def check_sum(path: Path) -> None:
    """Raise UserError unless the file at `path` is as its run left it.

    A folder without checksums, of a run of before there were any, is accepted.
    """
    check_sums(path.parent, (path.name,), sums_of(path.parent))


def check_sums(folder: Path | str, names: Sequence[str], known: Mapping[str, str] | None) -> bool:
    """As `check_sum`, for several files of a folder whose checksums are `known`. Returns whether it has any."""
    if known is None:
        return False
    for name in names:
        try:
            content = read_bytes(f"{folder}/{name}")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(
                f"{Path(folder, name)} cannot be checked against {SUMS_FILE} beside it ({error}); {ADVICE}"
            ) from error
        check_content(folder, name, content, known)
    return True


def check_content(folder: Path | str, name: str, content: bytes, known: Mapping[str, str] | None) -> None:
    """As `check_sum`, for a file that was read already, in a folder whose checksums are `known`."""
    if known is None:
        return
    if name not in known:
        raise UserError(f"{Path(folder, SUMS_FILE)} is damaged, so that {name} cannot be checked; {ADVICE}")
    if known[name] != hashlib.sha256(content).hexdigest():
        raise UserError(
            f"{Path(folder, name)} is not as its run wrote it: its checksum differs from that in {SUMS_FILE} "
            f"beside it; {ADVICE}"
        )


# Paths are text and files are numbers here: tables read ten thousands of them, and objects would double the time.
def read_bytes(path: str) -> bytes:
    """The content of a small file."""
    file = os.open(path, os.O_RDONLY)
    try:
        content = os.read(file, _BLOCK)
        while more := os.read(file, _BLOCK):
            content += more
        return content
    finally:
        os.close(file)


def sums_of(folder: Path | str) -> dict[str, str] | None:
    """The checksums of the files of a run folder by name; none for a damaged file, None where there is no file.

    Raises UserError for one that cannot be read.
    """
    try:
        lines = read_bytes(f"{folder}/{SUMS_FILE}").decode("ascii").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{Path(folder, SUMS_FILE)} cannot be read ({error}); {ADVICE}") from error
    found = [_LINE.fullmatch(line) for line in lines]
    known = {match[2]: match[1] for match in found if match}
    return known if len(known) == len(lines) else {}  # damaged: it knows no file, so that each is refused
