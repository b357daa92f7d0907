"""`qprune data get` against a server of this machine that breaks off, resumes, lies and fails."""

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from qprune.atomic_write import png_bytes
from qprune.cli import data
from qprune.cli import main as cli
from qprune.cli.data import Archive, fetch
from qprune.errors import RunFailure, UserError


class Server(ThreadingHTTPServer):
    """Serves `content`; the next answer breaks off after `breaks_after` bytes; `ranges`: whether parts are served."""

    content = b""
    breaks_after: int | None = None
    ranges = True
    requests: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.requests.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        body = self.server.content[start:]
        if self.path != "/set":
            self.send_error(404)
            return
        self.send_response(206 if start else 200)
        if start:
            size = len(self.server.content)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        cut, self.server.breaks_after = self.server.breaks_after, None
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


PICTURE = png_bytes(torch.zeros(3, 2, 2, dtype=torch.uint8))


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def tar_of(*names: str, link: str | None = None) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(PICTURE)
            tar.addfile(info, io.BytesIO(PICTURE))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(info)
    return content.getvalue()


def zip_of(*names: str, mode: int = 0o100644) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as zipped:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            zipped.writestr(info, PICTURE)
    return content.getvalue()


Publish = Callable[[bytes], Server]


@pytest.fixture
def publish(server: Server, monkeypatch: pytest.MonkeyPatch) -> Publish:
    def make(content: bytes) -> Server:
        server.content = content
        url = f"http://127.0.0.1:{server.server_address[1]}/set"
        archive = Archive(url, len(content), hashlib.sha256(content).hexdigest(), ("train", "test"))
        monkeypatch.setitem(data.ARCHIVES, "facades", archive)
        return server

    return make


GOOD = ("facades/train/1.jpg", "facades/test/1.jpg")


@pytest.mark.parametrize("content", [tar_of(*GOOD), zip_of(*GOOD)], ids=["tar.gz", "zip"])
def test_a_set_is_fetched_checked_and_unpacked_once(
    content: bytes, publish: Publish, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = publish(content)
    for _ in range(2):
        assert cli.main(["data", "get", "facades", "--root", str(tmp_path / "new")]) == 0
        assert capsys.readouterr().out == f"facades: {tmp_path / 'new' / 'facades'}\n"
    assert server.requests == [None]
    assert visible(tmp_path / "new") == ["facades"]
    digest = hashlib.sha256(PICTURE).hexdigest()
    sums = (tmp_path / "new" / "facades" / "SHA256SUMS").read_text()
    assert sums == f"{digest}  test/1.jpg\n{digest}  train/1.jpg\n"
    assert (tmp_path / "new" / "facades" / "test" / "1.jpg").read_bytes() == PICTURE


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_resumed(ranges: bool, publish: Publish, tmp_path: Path) -> None:
    server = publish(tar_of(*GOOD))
    server.breaks_after, server.ranges = 40, ranges
    with pytest.raises(RunFailure, match="it ended after 40 of .* the same command goes on where this one stopped"):
        fetch("facades", tmp_path)
    assert (tmp_path / "facades.part").stat().st_size == 40
    assert (fetch("facades", tmp_path) / "train" / "1.jpg").exists()
    assert server.requests == [None, "bytes=40-"]


def test_other_content_is_refused_and_set_aside(publish: Publish, tmp_path: Path) -> None:
    server = publish(tar_of(*GOOD))
    server.content = bytes(len(server.content))
    with pytest.raises(UserError, match="not the published set: its sha256 is .* kept as .*refused; the same command"):
        fetch("facades", tmp_path)
    assert visible(tmp_path) == ["facades.refused"]
    server.content = tar_of(*GOOD) + b"more"
    with pytest.raises(UserError, match="not the published set: it has .* bytes, the published archive"):
        fetch("facades", tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            tar_of("facades/train/1.jpg", "../outside"),
            "a path that leads out of its folder, or is no text: '../outside'",
        ),
        (zip_of("/outside"), "a path that leads out of its folder, or is no text: '/outside'"),
        (tar_of(*GOOD, link="facades/link"), "holds 'facades/link', which is no plain file"),
        (zip_of("facades/link", mode=0o120777), "holds 'facades/link', which is no plain file"),
        (tar_of("facades/train/1.jpg"), "it lacks facades/test; it is kept as"),
        (b"no archive at all", "is damaged"),
        (tar_of(*GOOD)[:60], "is damaged"),
    ],
    # Ids of their own: an archive holds the time at which it was made, and every worker makes one.
    ids=["path up", "path from the root", "link", "link in a zip", "half a set", "no archive", "torn"],
)
def test_bad_archives_leave_nothing_behind(content: bytes, problem: str, publish: Publish, tmp_path: Path) -> None:
    publish(content)
    with pytest.raises(UserError, match=problem):
        fetch("facades", tmp_path / "root")
    assert visible(tmp_path / "root") == ["facades.refused"]
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_what_cannot_be_fetched_is_named_with_a_remedy(publish: Publish, tmp_path: Path) -> None:
    port = publish(tar_of(*GOOD)).server_address[1]
    with pytest.raises(RunFailure, match="/nothing could not be fetched .*404.* a mirror with --url ADDRESS"):
        fetch("facades", tmp_path, f"http://127.0.0.1:{port}/nothing")
    with pytest.raises(UserError, match="--url file:///etc is no address"):
        fetch("facades", tmp_path, "file:///etc")


def test_half_a_set_and_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "facades" / "train").mkdir(parents=True)
    advice = "is not the whole set .it lacks val, test and holds train. and stays as it is; fetch .* with --root FOLDER"
    with pytest.raises(UserError, match=advice):
        fetch("facades", tmp_path)
    assert [path.name for path in (tmp_path / "facades").iterdir()] == ["train"]
    assert cli.main(["data", "get", "facade"]) == 2
    assert "'facade' is not one of facades, horse2zebra; did you mean 'facades'?" in capsys.readouterr().err
