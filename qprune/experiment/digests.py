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
    sums = path.parent / SUMS_FILE
    try:
        lines = sums.read_bytes().decode("ascii").splitlines()
        content = path.read_bytes() if content is None else content
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be checked against {SUMS_FILE} beside it ({error}); {ADVICE}") from error
    found = [_LINE.fullmatch(line) for line in lines]
    known = {match[2]: match[1] for match in found if match}
    if len(known) != len(lines) or path.name not in known:
        raise UserError(f"{sums} is damaged, so that {path.name} cannot be checked; {ADVICE}")
    if known[path.name] != hashlib.sha256(content).hexdigest():
        raise UserError(
            f"{path} is not as its run wrote it: its checksum differs from that in {SUMS_FILE} beside it; {ADVICE}"
        )
