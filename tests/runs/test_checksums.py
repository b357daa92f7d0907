"""Checksums of a folder: what is accepted, and what is refused as damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from qprune.errors import UserError
from qprune.runs.checksums import check_sum, check_sums, sums_of, write_sums


def test_files_are_checked_where_a_folder_has_checksums(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    assert not check_sums(tmp_path, ["a.txt"], sums_of(tmp_path))
    write_sums(tmp_path, ["a.txt"])
    assert check_sums(tmp_path, ["a.txt"], sums_of(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"b")
    with pytest.raises(UserError, match="a.txt is not as its run wrote it"):
        check_sum(tmp_path / "a.txt")


def damages(text: str) -> list[str]:
    return [text + text, "", text.upper(), text + "more\n"]


@pytest.mark.parametrize("which", range(4))
def test_damaged_checksums_refuse_every_file(tmp_path: Path, which: int) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    write_sums(tmp_path, ["a.txt"])
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(damages(sums.read_text())[which])
    for check in (lambda: check_sum(tmp_path / "a.txt"), lambda: check_sums(tmp_path, ["a.txt"], sums_of(tmp_path))):
        with pytest.raises(UserError, match="SHA256SUMS is damaged, so that a.txt cannot be checked"):
            check()
