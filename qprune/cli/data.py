"""`qprune data get`: fetch a published data set, check it, and unpack it."""

import argparse
import gzip
import hashlib
import http.client
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qprune.errors import RunFailure, UserError, one_of

TIMEOUT = 60  # seconds without a byte


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
    get.add_argument("name", metavar="NAME", help=", ".join(ARCHIVES))
    root, text = os.environ.get("QPRUNE_DATA", "data"), "folder of the data sets (default: QPRUNE_DATA, or data)"
    get.add_argument("--root", type=Path, default=root, help=text)
    get.add_argument("--url", help="another address of the same archive, such as a mirror's")
    options = parser.parse_args(arguments)
    one_of("qprune data get: NAME", options.name, ARCHIVES)
    print(f"{options.name}: {fetch(options.name, options.root, options.url)}")
    return 0


def fetch(name: str, root: Path, url: str | None = None) -> Path:
    """Fetch a set into ROOT/NAME, by way of ROOT/NAME.part, unless it is there.

    Raises UserError for an archive that is unsafe or not the published one, RunFailure for a download that fails.
    """
    archive, folder, partial = ARCHIVES[name], root / name, root / f"{name}.part"
    url = url or archive.url
    if folder.is_dir():
        if missing := [part for part in archive.folders if not (folder / part).is_dir()]:
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise UserError(
                f"{folder} is not the whole set (it lacks {', '.join(missing)} and holds {there}) and stays as it is; "
                "fetch the set into another folder with --root FOLDER"
            )
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        _download(url, partial, archive.size)
        _check(partial, archive)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as unpacked:
            _unpack(partial, Path(unpacked))
            if missing := [part for part in archive.folders if not Path(unpacked, name, part).is_dir()]:
                raise UserError(f"{partial} lacks {name}/{missing[0]}; remove the file, and start the command again")
            Path(unpacked, name).replace(folder)
        partial.unlink()
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        advice = "the same command goes on where this one stopped, or takes a mirror with --url ADDRESS"
        raise RunFailure(f"{url} could not be fetched ({error}); {advice}") from error
    except OSError as error:
        text = f"{root} cannot take the data set {name} ({error}); choose another folder with --root"
        raise RunFailure(text) from error
    return folder


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
    """Raise UserError, and set the file aside, unless size and checksum are right."""
    with partial.open("rb") as file:
        size, digest = partial.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
    problem = "" if size == archive.size else f"it has {size} bytes, the published archive {archive.size}"
    if not problem and archive.sha256 not in (None, digest):
        problem = f"its sha256 is {digest[:16]}..., that of the published archive {str(archive.sha256)[:16]}..."
    if problem:
        aside = partial.replace(partial.with_suffix(".refused"))
        raise UserError(f"what was fetched is not the published archive: {problem}; it is kept as {aside}; try again")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack into `folder`. Raises UserError for a damaged or dangerous archive."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for info in zipped.infolist():  # the upper 4 bits of the Unix mode, if there is one, are the type
                    _check_member(archive, info.filename, info.is_dir() or info.external_attr >> 28 in (0, 0o10))
                zipped.extractall(folder)
        else:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _check_member(archive, member.name, member.isfile() or member.isdir())
                tar.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it, and start the command again") from error


def _check_member(archive: Path, name: str, is_plain: bool) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise UserError(f"{archive} holds a path that leads out of its folder, {name!r}; nothing was unpacked")
    if not is_plain:
        raise UserError(f"{archive} holds {name!r}, which is no plain file; nothing was unpacked")
