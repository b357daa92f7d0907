"""`qprune data get`: fetch a published data set; resumes what broke off, and checks before it unpacks."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from qprune.errors import RunFailure, UserError, one_of

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True)
class Archive:
    """A published archive: address, size in bytes, sha256 where one is known, and the folders that it unpacks to."""

    url: str
    size: int
    sha256: str | None
    folders: tuple[str, ...]


# facades: the authors publish no checksum. horse2zebra: as TensorFlow Datasets has it.
ARCHIVES = {
    "facades": Archive(
        "http://efrosgans.eecs.berkeley.edu/pix2pix/datasets/facades.tar.gz",
        30_168_306,
        None,
        ("train", "val", "test"),
    ),
    "horse2zebra": Archive(
        "http://efrosgans.eecs.berkeley.edu/cyclegan/datasets/horse2zebra.zip",
        116_867_962,
        "a74d9d392eecca9966b51287a76ca126af473d9de4f3e8fc0e9cda08fa1730a1",
        ("trainA", "trainB", "testA", "testB"),
    ),
}


def main(arguments: Sequence[str]) -> int:
    """`qprune data get NAME [--root FOLDER] [--url ADDRESS]`."""
    parser = argparse.ArgumentParser("qprune data", description="Fetch the published data sets.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="get")
    get = verbs.add_parser("get", help="fetch, check and unpack a set; a broken download is resumed")
    get.add_argument("name", metavar="NAME", help=", ".join(ARCHIVES))
    root = os.environ.get("QPRUNE_DATA", "data")
    get.add_argument(
        "--root", type=Path, default=Path(root), help="folder of the data sets (default: QPRUNE_DATA, or data)"
    )
    get.add_argument("--url", help="another address of the same archive, such as a mirror's")
    options = parser.parse_args(arguments)
    one_of("qprune data get: NAME", options.name, ARCHIVES)
    folder = fetch(options.name, options.root, options.url)
    print(f"{options.name}: {folder}")
    return 0


def fetch(name: str, root: Path, url: str | None = None) -> Path:
    """Make ROOT/NAME hold the set and return it; does nothing where it is there already.

    The archive is kept as ROOT/NAME.part while it is incomplete. The folder appears in one piece or not at all.
    Raises UserError for an archive that is not the published one, RunFailure where it cannot be fetched or stored.
    """
    archive, folder = ARCHIVES[name], root / name
    if folder.is_dir():
        if missing := [part for part in archive.folders if not (folder / part).is_dir()]:
            raise UserError(f"{folder} is there and lacks {', '.join(missing)}; remove it, and start the command again")
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        partial = root / f"{name}.part"
        _download(url or archive.url, partial, archive.size)
        _check(partial, archive)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as unpacked:
            _unpack(partial, Path(unpacked))
            made = Path(unpacked) / name
            if missing := [part for part in archive.folders if not (made / part).is_dir()]:
                raise UserError(f"{partial} lacks {name}/{missing[0]}; remove the file, and start the command again")
            made.replace(folder)
        partial.unlink()
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise RunFailure(
            f"{url or archive.url} could not be fetched ({error}); the same command goes on where this one stopped, or "
            "takes a mirror with --url ADDRESS"
        ) from error
    except OSError as error:
        raise RunFailure(
            f"{root} cannot take the data set {name} ({error}); choose another folder with --root"
        ) from error
    return folder


def _download(url: str, partial: Path, size: int) -> None:
    """Append to `partial` what it lacks of `size` bytes; begin anew where the server cannot send a part."""
    if not url.startswith(("http://", "https://")):
        raise UserError(f"--url {url} is no address; give one that begins with http:// or https://")
    have = partial.stat().st_size if partial.exists() else 0
    if have >= size:  # whole, or no part of this archive: the check tells
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
            raise RunFailure(f"{url} answered with another part than the one asked for; remove {partial} and try again")
        with partial.open("ab" if resumed else "wb") as file:
            while block := response.read(CHUNK):
                file.write(block)
                if file.tell() > size:  # no server may fill the disk
                    break
    if partial.stat().st_size < size:
        raise ConnectionError(f"it ended after {partial.stat().st_size} of {size} bytes")


def _check(partial: Path, archive: Archive) -> None:
    """Raise UserError, and set the file aside, unless it has the published size and checksum."""
    size = partial.stat().st_size
    problem = "" if size == archive.size else f"it has {size} bytes, the published archive {archive.size}"
    if not problem and archive.sha256 is not None:
        with partial.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != archive.sha256:
            problem = f"its sha256 is {found[:16]}..., that of the published archive {archive.sha256[:16]}..."
    if problem:
        aside = partial.replace(partial.with_suffix(".refused"))
        raise UserError(f"what was fetched is not the published archive: {problem}; it is kept as {aside}; try again")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack regular files into `folder`. Raises UserError for a damaged archive, a link or a path that leads out."""
    members = _zip_members(archive) if zipfile.is_zipfile(archive) else _tar_members(archive)
    try:
        for name, content in members:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                raise UserError(f"{archive} holds a path that leads out of its folder, {name!r}; nothing was unpacked")
            target = folder.joinpath(*path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(content, file, CHUNK)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it, and start the command again") from error


def _tar_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name, content
            elif not member.isdir():
                raise UserError(f"{archive} holds {member.name!r}, which is no plain file; nothing was unpacked")


def _zip_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            kind = info.external_attr >> 28  # of the Unix mode, where there is one: 0o4 folder, 0o10 plain file
            if not info.is_dir() and kind not in (0, 0o10):
                raise UserError(f"{archive} holds {info.filename!r}, which is no plain file; nothing was unpacked")
            if not info.is_dir():
                with zipped.open(info) as content:
                    yield info.filename, content
