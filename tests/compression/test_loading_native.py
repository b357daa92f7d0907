"""Compiling the kernels: where it cannot be done there are none, and nothing that lies about can be taken for them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from qprune.compression import native as kernels

needs_compiler = pytest.mark.skipif(not kernels.load(), reason="no C compiler here makes the kernels")
kernels._library = None


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_library", None)


@needs_compiler
def test_kernels_that_disagree_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_same_bits", lambda a, b: False)
    with pytest.warns(UserWarning, match="the compiled kernels do not compute what torch does here; they are not used"):
        assert not kernels.load()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "echo 'unclosed"], ids=["missing", "fails", "typo"])
def test_without_a_compiler_that_works_there_are_no_kernels(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    assert not kernels.load()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not kernels.load()


@needs_compiler
def test_a_compiler_may_be_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"env {os.environ.get('CC', 'cc')}")
    assert kernels.load()


def test_without_a_place_for_temporary_files_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert not kernels.load()


@needs_compiler
def test_what_is_in_a_shared_folder_is_neither_loaded_nor_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("kernels.so", "kernels.o", "qprune-kernels.so"):
        (tmp_path / name).write_bytes(b"a stranger's")
    before, loaded = sorted(tmp_path.iterdir()), []
    cdll = kernels.ctypes.CDLL

    def note(path: str) -> Any:
        loaded.append((Path(path).parent.parent, Path(path).parent.stat().st_mode & 0o777))
        return cdll(path)

    monkeypatch.setattr(kernels.ctypes, "CDLL", note)
    assert kernels.load()
    assert loaded == [(tmp_path, 0o700)]  # from a folder of its own in which nobody else can write
    assert sorted(tmp_path.iterdir()) == before


@needs_compiler
def test_processes_may_compile_at_once(tmp_path: Path) -> None:
    probe = "from qprune.compression import kernels; assert kernels.load()"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", probe], env=environment) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_threads_are_those_of_torch() -> None:
    """One pool: a second one would fight with torch's for the cores."""
    probe = (
        "import torch; from qprune.compression import kernels; assert kernels.load(); "
        "print(sorted({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.count(".so") == 1, done.stdout
