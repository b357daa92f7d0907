"""`qprune data get`: fetch a published data set, check it, and unpack it."""

import argparse
import bz2
import errno
import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from qprune.errors import RunFailure, UserError, one_of
from qprune.training.progress import print_text

TIMEOUT = 60  # seconds without a byte
SUMS_FILE = "SHA256SUMS"  # of what was unpacked, in its folder, as the tool sha256sum reads it
PICTURES, FORMATS = (".png", ".jpg", ".jpeg"), ("PNG", "JPEG")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
# Compressed tars by their first bytes. All hold checksums of the content; a plain tar does not.
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


@dataclass(frozen=True)
class Archive:
    """A published archive: address, bytes, sha256 if known, folders that it holds."""

    url: str
    size: int
    sha256: str | None
    folders: tuple[str, ...]


_SERVER = "http://efrosgans.eecs.berkeley.edu"
_FACADES, _HORSES = f"{_SERVER}/pix2pix/datasets/facades.tar.gz", f"{_SERVER}/cyclegan/datasets/horse2zebra.zip"
_SUM = "a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1"  # as TensorFlow Datasets has it
ARCHIVES = {  # the authors publish no checksum of facades
    "facades": Archive(_FACADES, 30_168_306, None, ("train", "val", "test")),
    "horse2zebra": Archive(_HORSES, 116_867_962, _SUM, ("trainA", "trainB", "testA", "testB")),
}


def main(arguments: Sequence[str]) -> int:
    """Carry out `qprune data get NAME [--root FOLDER] [--url ADDRESS]`."""
    parser = argparse.ArgumentParser("qprune data", description="Fetch the published data sets.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="get")
    get = verbs.add_parser("get", help="fetch, check and unpack a set; a broken download is resumed")
    get.add_argument("name", metavar="|".join(ARCHIVES), help="the data set")
    root, text = os.environ.get("QPRUNE_DATA", "data"), "folder of the data sets (default: QPRUNE_DATA, or data)"
    get.add_argument("--root", type=Path, default=root, help=text)
    get.add_argument("--url", help="another address of the same archive, such as a mirror's")
    options = parser.parse_args(arguments)
    one_of("qprune data get: NAME", options.name, ARCHIVES)
    print_text(f"{options.name}: {fetch(options.name, options.root, options.url)}")
    return 0


def fetch(name: str, root: Path, url: str | None = None) -> Path:
    """Fetch a set into ROOT/NAME, by way of ROOT/NAME.part, unless it is there.

    Raises UserError for an archive that is unsafe or not the published one, RunFailure for a download that fails.
    """
    archive, folder, partial = ARCHIVES[name], root / name, root / f"{name}.part"
    url = url or archive.url
    if _is_there(folder, archive):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root, name):
            if not _is_there(folder, archive):
                _download(url, partial, archive.size)
                _install(partial, folder, archive)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        advice = "the same command goes on where this one stopped, or takes a mirror with --url ADDRESS"
        raise RunFailure(f"{url} could not be fetched ({error}); {advice}") from error
    except OSError as error:
        text = f"{root} cannot take the data set {name} ({error}); choose another folder with --root"
        raise RunFailure(text) from error
    return folder


def _alone(root: Path, name: str) -> AbstractContextManager[Any]:
    """Hold the one lock on fetching a set, waiting for another process that has it."""
    lock = FileLock(root / f".{name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print_text(f"another process fetches {name} into {root}; waiting for it")
        return lock.acquire()


def _is_there(folder: Path, archive: Archive) -> bool:
    """Whether the set is there. Raises UserError for a part of it."""
    if not folder.is_dir():
        return False
    if missing := [part for part in archive.folders if not (folder / part).is_dir()]:
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UserError(
            f"{folder} is not the whole set (it lacks {', '.join(missing)} and holds {there}) and stays as it is; "
            "fetch the set into another folder with --root FOLDER"
        )
    return True


def _install(partial: Path, folder: Path, archive: Archive) -> None:
    """Check the archive, unpack it, look at what it holds, and put that in place; else set the archive aside."""
    place = folder.with_name(f".{folder.name}-unpacked")
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    try:
        _check(partial, archive)
        _unpack(partial, place)
        if missing := [part for part in archive.folders if not (place / folder.name / part).is_dir()]:
            raise UserError(f"it lacks {folder.name}/{missing[0]}")
        paths = sorted(path for path in (place / folder.name).rglob("*") if path.is_file())
        sums = [f"{_sum_of_whole(path)}  {path.relative_to(place / folder.name).as_posix()}\n" for path in paths]
        (place / folder.name / SUMS_FILE).write_text("".join(sums), encoding="utf-8")
        (place / folder.name).replace(folder)
    except UserError as error:
        aside = partial.replace(partial.with_suffix(".refused"))
        raise UserError(
            f"what was fetched is not the published set: {error}; it is kept as {aside}; the same command fetches it "
            "again, and --url ADDRESS takes it from a mirror"
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    partial.unlink()


def _sum_of_whole(path: Path) -> str:
    """Return a file's sha256, of a picture after it was decoded. Raises UserError."""
    if path.suffix.lower() in PICTURES:
        try:
            with Image.open(path, formats=FORMATS) as image:
                image.load()
        except Exception as error:  # Pillow reports damage in many ways, depending on the format
            raise UserError(f"its picture {path.name} cannot be decoded ({error})") from error
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(url: str, partial: Path, size: int) -> None:
    """Append to `partial` what it lacks; start again without support for ranges."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url} is no address; give one that begins with http:// or https://")
    have = partial.stat().st_size if partial.exists() else 0
    if have >= size:  # complete, or not the published archive: checked next
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            raise RunFailure(f"{url} answered with another part than the one asked for; remove {partial} and try again")
        with partial.open("ab" if resumed else "wb") as file:
            while file.tell() <= size and (block := response.read(1 << 20)):  # no server may fill the disk
                file.write(block)
    if (have := partial.stat().st_size) < size:
        raise ConnectionError(f"it ended after {have} of {size} bytes")


def _check(partial: Path, archive: Archive) -> None:
    """Raise UserError unless size and checksum are right."""
    with partial.open("rb") as file:
        size, digest = partial.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    problem = "" if size == archive.size else f"it has {size} bytes, the published archive {archive.size}"
    if not problem and archive.sha256 not in (None, digest):
        problem = f"its sha256 is {digest[:16]}..., that of the published archive {str(archive.sha256)[:16]}..."
    if problem:
        raise UserError(problem)


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack into `folder`, and read to the end. Raises UserError for a damaged or dangerous archive."""
    with archive.open("rb") as file:
        start = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
    try:
        if opener is not None:
            with opener(archive) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for member in tar:
                    _check_member(member.name, member.isfile() or member.isdir())
                tar.extractall(folder, filter="data")
                while stream.read(1 << 20):  # the checksum of a stream is behind its last byte
                    pass
        elif zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for info in zipped.infolist():  # the upper 4 bits of the Unix mode, if there is one, are the type
                    _check_member(info.filename, info.is_dir() or info.external_attr >> 28 in (0, 0o10))
                zipped.extractall(folder)
        else:
            raise UserError("it is damaged, or neither a zip nor a compressed tar")
    except UserError:
        raise
    except Exception as error:  # unpackers fail in many ways; only the disk's are not the archive's
        if isinstance(error, OSError) and error.errno in _DISK:
            raise
        raise UserError(f"it is damaged or cannot be unpacked ({error or type(error).__name__})") from error


def _check_member(name: str, is_plain: bool) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not name.isprintable():
        raise UserError(f"it holds a path that leads out of its folder, or is no text: {name!r}")
    if not is_plain:
        raise UserError(f"it holds {name!r}, which is no plain file")
