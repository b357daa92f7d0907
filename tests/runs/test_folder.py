"""A run's folder: checksums, the state of a run, the note of a stopped one, and the search by signature."""

from pathlib import Path
from typing import Any

import pytest

from qprune.errors import UserError
from qprune.runs.folder import RunFolder, sum_of
from tests.runs.test_row import FIELDS, stored


def test_files_are_checked_where_a_folder_has_checksums(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"a")
    assert not folder.check("a.txt")
    folder.write_sums({"a.txt": sum_of(b"a")})
    assert folder.check("a.txt", "missing.txt")
    (tmp_path / "a.txt").write_bytes(b"b")
    with pytest.raises(UserError, match=r"a.txt is not as its run wrote it: its checksum differs from that in SHA256"):
        folder.check("a.txt")


@pytest.mark.parametrize("damage", [lambda t: t + t, lambda t: "", str.upper, lambda t: t + "more\n"])
def test_damaged_checksums_refuse_every_file(tmp_path: Path, damage: Any) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    RunFolder(tmp_path).write_sums({"a.txt": sum_of(b"a")})
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(damage(sums.read_text()))
    with pytest.raises(UserError, match="SHA256SUMS is damaged, so that a.txt cannot be checked"):
        RunFolder(tmp_path).check("a.txt")


def test_the_state_of_a_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.state() == ("to do", None)
    with folder.locked(wait=False):
        assert folder.state() == ("running", None)
        with pytest.raises(UserError, match="is being run by another process; type wait=true"), folder.locked(False):
            pass
    (folder.path / "checkpoints").mkdir()
    (folder.path / "checkpoints" / "step.pt").write_bytes(b"")
    assert folder.state() == ("interrupted", None)
    path = stored(folder.path)
    assert folder.state() == ("done", folder.row())
    path.write_text("{")
    assert folder.state() == ("broken", None)
    folder.empty()
    assert [path.name for path in folder.path.iterdir()] == [".lock"]


def test_the_note_of_a_stopped_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.stopped() is None
    folder.note_stopped("hopeless", 28.4)
    assert (note := folder.stopped()) is not None
    assert (note.reason, note.optimistic_score) == ("hopeless", 28.4)
    for broken in ("", "[]", '{"reason": "x"}', '{"reason": "x", "optimistic_score": "y"}'):
        (tmp_path / "stopped.json").write_text(broken, encoding="utf-8")
        with pytest.raises(UserError, match=r"stopped\.json: .*; delete it$"):
            folder.stopped()


def test_runs_are_found_by_path_or_signature(tmp_path: Path) -> None:
    signatures = ["0123456789" + digit * 54 for digit in "ab"]
    paths = [tmp_path / "toy" / f"{name}-0123456789" for name in ("prune", "quantize")]
    for path, signature in zip(paths, signatures, strict=True):
        stored(path, signature=signature)
        assert RunFolder.find(signature, tmp_path).path == RunFolder.find(str(path), tmp_path).path == path
    assert FIELDS["signature"] not in signatures
    begun = tmp_path / "toy" / "begun-abcdef0123"
    begun.mkdir()
    (begun / "config.yaml").touch()
    for given, said in (
        ("012345", "2 runs have a signature that begins with 012345: give more digits"),
        ("abcdef", f"no finished run below .* begins with abcdef; the run in {begun} is not finished"),
        (str(begun), f"{begun} is not finished .it has no result.json.; finish the run"),
        (str(tmp_path), "is no run folder"),
        ("0123x", "is neither a folder nor the beginning of a signature .6 digits or more.; give a run folder"),
    ):
        with pytest.raises(UserError, match=said):
            RunFolder.find(given, tmp_path)
