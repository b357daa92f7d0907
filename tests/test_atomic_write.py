"""Files are written whole, with the permissions that the umask gives."""

import os
from pathlib import Path

import pytest

from qprune.atomic_write import write_atomically
from qprune.errors import UserError


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_permissions_are_those_of_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "report.html", b"page")
    finally:
        os.umask(before)
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == mode


def test_what_cannot_be_written_leaves_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    (tmp_path / "folder").write_bytes(b"a file in the place of the folder")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(path, b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
