"""Checksums of a finished run's files, so that one that was edited, mixed up or damaged later is noticed.

They stand in the run folder in the format of the tool `sha256sum`, which can check them too: sha256sum -c SHA256SUMS
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from qprune.errors import UserError
from qprune.experiment.files import write_atomically

SUMS_FILE = "SHA256SUMS"
ADVICE = "delete the run's folder, or run its command again with force=true"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def write_sums(folder: Path, names: Sequence[str], **to_come: bytes) -> None:
    """Write the checksums of the files `names` of `folder`, and of files that are written next, given by content."""
    contents = {name: (folder / name).read_bytes() for name in names} | to_come
    lines = [f"{hashlib.sha256(contents[name]).hexdigest()}  {name}\n" for name in sorted(contents)]
    write_atomically(folder / SUMS_FILE, "".join(lines).encode())


def check_sum(path: Path, content: bytes | None = None) -> None:
    """Raise UserError unless the file at `path` (its `content` where it was read already) is as its run left it.

    A folder without checksums, of a run of before there were any, is accepted.
    """
    known = _sums_of(path.parent)
    if known is not None:
        _check(path.parent, path.name, known, content)


def check_sums(folder: Path, names: Sequence[str]) -> bool:
    """As `check_sum`, for several files of a folder. Returns whether it has checksums."""
    known = _sums_of(folder)
    if known is None:
        return False
    for name in names:
        _check(folder, name, known, None)
    return True


# Paths are joined as text here: tables look at ten thousands of files, and pathlib would take as long as reading them.
def _sums_of(folder: Path) -> dict[str, str] | None:
    try:
        with open(f"{folder}/{SUMS_FILE}", "rb", buffering=0) as file:  # noqa: PTH123
            lines = file.read().decode("ascii").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / SUMS_FILE} cannot be read ({error}); {ADVICE}") from error
    found = [_LINE.fullmatch(line) for line in lines]
    known = {match[2]: match[1] for match in found if match}
    return known if len(known) == len(lines) else {}  # damaged: it knows no file, so that each is refused


def _check(folder: Path, name: str, known: dict[str, str], content: bytes | None) -> None:
    try:
        if content is None:
            with open(f"{folder}/{name}", "rb", buffering=0) as file:  # noqa: PTH123
                content = file.read()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{folder / name} cannot be checked against {SUMS_FILE} beside it ({error}); {ADVICE}"
        ) from error
    if name not in known:
        raise UserError(f"{folder / SUMS_FILE} is damaged, so that {name} cannot be checked; {ADVICE}")
    if known[name] != hashlib.sha256(content).hexdigest():
        raise UserError(
            f"{folder / name} is not as its run wrote it: its checksum differs from that in {SUMS_FILE} "
            f"beside it; {ADVICE}"
        )
