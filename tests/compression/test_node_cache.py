"""Building the operators in C++: beside a run, once, for this user alone, and nothing that computes otherwise."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from qprune.compression import native as kernels
from qprune.compression import node_cache, nodes


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a process that uses nothing yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(node_cache.CACHE, str(folder))
    monkeypatch.setattr(kernels, "_library", None)
    monkeypatch.setattr(nodes, "_operate", None)
    if not kernels.load():
        pytest.skip("no C compiler here makes the kernels")
    return folder


def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> Path:
    """A compiler that notes its calls in the file returned, then does what the words say to the shell, to `$out`."""
    script, calls = tmp_path / "c++", tmp_path / "calls"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\nwhile [ "$1" != -o ]; do shift; done\nout="$2"\n{does}\n', encoding="utf-8"
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return calls


def test_what_is_built_is_kept_for_this_user_and_used(
    cache: Path, built_nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(tmp_path, monkeypatch, f'cp {built_nodes} "$out"')
    assert not nodes.load()
    assert not cache.exists()  # looking leaves nothing behind
    assert node_cache.build()
    assert sorted(path.name for path in cache.iterdir()) == sorted(["lock", built_nodes.name])
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert nodes.load()
    assert node_cache.build()
    assert len(calls.read_text().splitlines()) == 1


def test_another_process_builds_beside_this_one(
    cache: Path, built_nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path, monkeypatch, f'cp {built_nodes} "$out"')
    before = time.monotonic()
    node_cache.build_beside()
    assert node_cache.built() is None  # nobody waited
    while node_cache.built() is None and time.monotonic() < before + 60:
        time.sleep(0.1)
    assert nodes.load()


def test_modules_in_the_current_folder_are_not_met(
    cache: Path, built_nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path, monkeypatch, f'cp {built_nodes} "$out"')
    (tmp_path / "torch.py").write_text("raise SystemExit('a stranger')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert node_cache.build()


def test_processes_that_build_at_once_build_once(
    cache: Path, built_nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(tmp_path, monkeypatch, f'sleep 1; cp {built_nodes} "$out"')
    probe = "from qprune.compression import node_cache; assert node_cache.build()"
    started = [subprocess.Popen([sys.executable, "-c", probe]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(calls.read_text().splitlines()) == 1


def test_what_cannot_be_built_is_said_in_a_file_and_not_tried_again_for_a_day(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(tmp_path, monkeypatch, "echo 'no such header' >&2; exit 1")
    assert not node_cache.build()
    [log] = cache.glob("*.log")
    assert log.read_text().startswith(str(tmp_path / "c++"))
    assert "no such header" in log.read_text()
    assert not node_cache.build()
    assert len(calls.read_text().splitlines()) == 1
    yesterday = time.time() - 25 * 3600
    os.utime(log, (yesterday, yesterday))
    assert not node_cache.build()
    assert len(calls.read_text().splitlines()) == 2


_OTHERWISE = {
    "what it computes is not what the function in Python does": "Py_INCREF(given[0]); return given[0];",
    "it ended the process that tried it": "__builtin_trap();",
}


@pytest.mark.parametrize("said", _OTHERWISE)
def test_what_computes_otherwise_is_not_kept(
    said: str, cache: Path, built_nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.c").write_text(
        "#include <Python.h>\n"
        "static PyObject *use(PyObject *self, PyObject *const *given, Py_ssize_t n) { Py_RETURN_NONE; }\n"
        f"static PyObject *operate(PyObject *self, PyObject *const *given, Py_ssize_t n) {{ {_OTHERWISE[said]} }}\n"
        'static PyMethodDef all[] = {{"use", (PyCFunction)(void *)use, METH_FASTCALL, 0},'
        '{"operate", (PyCFunction)(void *)operate, METH_FASTCALL, 0}, {0}};\n'
        'static PyModuleDef module = {PyModuleDef_HEAD_INIT, "qprune_nodes", 0, -1, all};\n'
        "PyMODINIT_FUNC PyInit_qprune_nodes(void) { return PyModule_Create(&module); }\n",
        encoding="utf-8",
    )
    include = sysconfig.get_path("include")
    compiler(tmp_path, monkeypatch, f'cc -shared -fPIC -I{include} {tmp_path}/other.c -o "$out"')
    (cache / "building-long-ago").mkdir(parents=True)  # of a process that was killed
    assert not node_cache.build()
    [log] = cache.glob("*.log")
    assert log.read_text() == f"{said}\n"
    assert not list(cache.glob("nodes-*.so"))
    assert not list(cache.glob("building-long-ago"))


def test_a_file_that_was_cut_off_is_thrown_away(
    cache: Path, built_nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler(tmp_path, monkeypatch, f'cp {built_nodes} "$out"')
    assert node_cache.build()
    built = cache / built_nodes.name
    built.write_bytes(built.read_bytes()[:1000])
    assert not nodes.load()
    assert not built.exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_nothing_is_taken_from_a_folder_that_others_may_write_to(
    mode: int, cache: Path, built_nodes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = compiler(tmp_path, monkeypatch, f'cp {built_nodes} "$out"')
    cache.mkdir()
    cache.chmod(mode)
    (cache / built_nodes.name).write_bytes(built_nodes.read_bytes())
    assert not nodes.load()
    (cache / built_nodes.name).unlink()
    assert not node_cache.build()
    assert not calls.exists()


@pytest.mark.parametrize("command", ["no-such-compiler", "c++ 'unclosed"], ids=["missing", "typo"])
def test_without_a_compiler_no_process_is_started(command: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", command)
    monkeypatch.setattr(os, "posix_spawn", lambda *_, **__: pytest.fail("started"))
    node_cache.build_beside()
    assert not cache.exists()


def test_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place() -> Path | None:
        path = node_cache._path()
        return path and path.parent

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(node_cache.CACHE)
    assert place() == tmp_path / ".cache" / "qprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert place() == tmp_path / "x" / "qprune"
    monkeypatch.setenv(node_cache.CACHE, str(tmp_path / "q"))
    assert place() == tmp_path / "q"
    monkeypatch.setenv(node_cache.CACHE, "")
    assert place() is None
    assert not node_cache.build()
    assert not nodes.load()
