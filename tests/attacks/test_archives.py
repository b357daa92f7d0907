"""Archives that are damaged, hostile, or fetched by two at once: unpacked as they were published, or refused."""

import io
import lzma
import random
import tarfile
import threading
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qprune.cli import data
from qprune.cli.data import Archive, fetch
from qprune.errors import UserError
from qprune.tasks.data.checksum import unpacked
from tests.attacks.conftest import TRIALS, Attacks, SilentDifferenceError

KINDS = ("gz", "bz2", "xz", "zip", "zip-deflated", "zip-bz2", "zip-lzma")
_METHODS = {"zip": 0, "zip-deflated": 8, "zip-bz2": 12, "zip-lzma": 14}


@cache
def pictures() -> dict[str, bytes]:
    """Pictures by their path in the archive."""
    found = {}
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 48, 3)).astype(np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, format="JPEG" if number % 2 else "PNG")
        found[f"facades/{('train', 'val', 'test')[number % 3]}/{number}.{'jpg' if number % 2 else 'png'}"] = (
            content.getvalue()
        )
    return found


@cache
def archive_of(kind: str) -> bytes:
    return packed(kind, pictures())


def packed(kind: str, files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    if kind in _METHODS:
        with zipfile.ZipFile(content, "w", _METHODS[kind]) as zipped:
            for name, picture in files.items():
                zipped.writestr(name, picture)
        return content.getvalue()
    with tarfile.open(fileobj=content, mode=f"w:{kind}") as tar:  # type: ignore[call-overload]
        for name, picture in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
    return content.getvalue()


Fetch = Callable[[bytes], dict[str, bytes] | None]


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """Fetch an archive whose download is done: the files that it gives, or None where it is refused in words."""
    count = iter(range(10**9))

    def fetch_one(content: bytes) -> dict[str, bytes] | None:
        root = tmp_path / str(next(count))
        root.mkdir()
        monkeypatch.setitem(
            data.ARCHIVES, "facades", Archive("http://127.0.0.1:9/", len(content), None, ("train", "val", "test"))
        )
        (root / "facades.part").write_bytes(content)
        try:
            folder = fetch("facades", root)
        except UserError as error:
            if "the same command fetches it again, and --url ADDRESS" not in str(error):
                raise AssertionError(f"no advice: {error}") from error
            left = sorted(path.name for path in root.iterdir() if path.name != ".facades.lock")
            assert left == ["facades.refused"], left
            return None
        finally:
            assert sorted(path.name for path in tmp_path.iterdir() if not path.name.isdigit()) == []
        found = {f"facades/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        del found["facades/SHA256SUMS"]
        return found

    return fetch_one


def as_published(found: dict[str, bytes] | None) -> None:
    if found is not None and found != pictures():
        raise SilentDifferenceError(f"{sorted(found)} are not as they were published")


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_noticed(kind: str, attacks: Attacks, fetched: Fetch) -> None:
    assert fetched(archive_of(kind)) == pictures()

    def trial(draw: random.Random) -> None:
        content = bytearray(archive_of(kind))
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        as_published(fetched(bytes(content)))

    attacks.run(f"archive {kind}: a flipped bit", trial)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stretch_of_zeros_or_a_cut_is_noticed(kind: str, attacks: Attacks, fetched: Fetch) -> None:
    def trial(draw: random.Random) -> None:
        content = bytearray(archive_of(kind))
        start = draw.randrange(len(content))
        if draw.random() < 0.5:
            length = min(draw.choice((1, 16, 512, 4096)), len(content) - start)
            content[start : start + length] = bytes(length)
        else:
            del content[start:]
        as_published(fetched(bytes(content)))

    attacks.run(f"archive {kind}: zeros or a cut", trial)


def with_member(path: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> bytes:
    """The archive with one more member."""
    made = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive_of("gz"))) as tar, tarfile.open(fileobj=made, mode="w:gz") as new:
        for info in tar.getmembers():
            new.addfile(info, tar.extractfile(info))
        info = tarfile.TarInfo(path)
        info.type, info.linkname = kind, target
        new.addfile(info)
    return made.getvalue()


def with_entries(change: Callable[[bytearray, int], None]) -> bytes:
    """The zip with each entry of its directory changed."""
    content = bytearray(archive_of("zip"))
    for start in range(len(content)):
        if content[start : start + 4] == b"PK\1\2":
            change(content, start)
    return bytes(content)


def with_broken_picture(draw: random.Random) -> bytes:
    files = dict(pictures())
    path = draw.choice(sorted(files))
    files[path] = files[path][: draw.randrange(len(files[path]) // 2)]
    return packed(draw.choice(KINDS), files)


OUT = ("../x", "/etc/x", "facades/../../x", "a\\..\\x", "c:/x", "facades/\x1b[2J", "x\n")
HOSTILE: tuple[Callable[[random.Random], bytes], ...] = (
    lambda draw: with_member(draw.choice(OUT)),
    lambda draw: with_member("facades/train/l", draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), "/etc/passwd"),
    lambda draw: with_member("facades/dev", draw.choice((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE))),
    lambda draw: with_entries(
        lambda content, start: content.__setitem__(start + 8, content[start + 8] | 1)
    ),  # encrypted
    lambda draw: with_entries(lambda content, start: content.__setitem__(start + 10, draw.choice((1, 6, 9, 19, 98)))),
    lambda draw: lzma.compress(archive_of("gz"), format=lzma.FORMAT_ALONE),
    lambda draw: packed("", pictures()),  # a plain tar has no checksum of its content
    lambda draw: packed(draw.choice(KINDS), {"facades/train/1.jpg": b""}),
    lambda draw: packed(draw.choice(KINDS), {"facades": b"", "facades/train": b""}),
    lambda draw: draw.randbytes(draw.randrange(1, 400)),
    lambda draw: draw.choice((b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"PK\3\4")) + draw.randbytes(50),
    with_broken_picture,
)


def test_hostile_archives_are_refused(attacks: Attacks, fetched: Fetch) -> None:
    def trial(draw: random.Random) -> None:
        if fetched(draw.choice(HOSTILE)(draw)) is not None:
            raise SilentDifferenceError("unpacked")

    attacks.run("archive: hostile", trial, 2 * TRIALS)


def test_a_set_is_fetched_by_several_at_once_and_again_after_a_refusal(
    attacks: Attacks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trial(draw: random.Random) -> None:
        root = tmp_path / str(draw.random())
        root.mkdir()
        content = archive_of(draw.choice(KINDS))
        archive = Archive("http://127.0.0.1:9/", len(content), None, ("train", "val", "test"))
        monkeypatch.setitem(data.ARCHIVES, "facades", archive)
        if draw.random() < 0.5:  # refused before, perhaps several times
            for _ in range(draw.randint(1, 3)):
                (root / "facades.part").write_bytes(bytes(len(content)))
                with pytest.raises(
                    UserError, match="not the published set: it is damaged, .*kept as .*refused; the same"
                ):
                    fetch("facades", root)
        (root / "facades.part").write_bytes(content)
        ended: list[Path | Exception] = []

        def work() -> None:
            try:
                ended.append(fetch("facades", root))
            except Exception as error:
                ended.append(error)

        threads = [threading.Thread(target=work) for _ in range(draw.randint(2, 4))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(ended) == {root / "facades"}, ended
        assert {path.name for path in root.iterdir()} <= {"facades", "facades.refused", ".facades.lock"}

    attacks.run("archive: several at once, or after a refusal", trial)


def test_a_set_that_is_changed_after_it_was_unpacked_is_noticed(
    attacks: Attacks, tmp_path: Path, fetched: Fetch
) -> None:
    fetched(archive_of("gz"))
    folder = tmp_path / "0" / "facades"
    recorded = unpacked(folder / "train", folder / "test")
    assert list(recorded) == ["unpacked"]

    def trial(draw: random.Random) -> None:
        path = draw.choice(sorted([*(folder / "train").iterdir(), *(folder / "test").iterdir(), folder / "SHA256SUMS"]))
        content = path.read_bytes()
        new = bytearray(content)
        new[draw.randrange(len(new))] ^= 1 << draw.randrange(8)
        path.unlink() if draw.random() < 0.2 and path.name != "SHA256SUMS" else path.write_bytes(new)
        try:
            if unpacked(folder / "train", folder / "test") == recorded:
                raise SilentDifferenceError(path.name)
        except UserError as error:
            if "is not as qprune data get unpacked it; fetch the set again, or delete" not in str(error):
                raise
        finally:
            path.write_bytes(content)

    attacks.run("archive: changed after it was unpacked", trial)
