"""Building nodes.cpp: once for a version of torch, by a process of its own, beside the first run that wants it.

It takes some 20 seconds of one core, too long to wait for and to do in every run. What comes out is kept in a folder
that only this user may write to: `QPRUNE_CACHE`, or `qprune` in the user's cache folder. An empty `QPRUNE_CACHE` says
that nothing is to be built or used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

CACHE = "QPRUNE_CACHE"  # a variable of the environment

_SOURCE = Path(__file__).with_name("nodes.cpp")
_ABI = f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"
_FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-s", _ABI)
_LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch_python")
_BUILDING = "building-"  # names of folders
_COMPILERS_SECONDS = 300.0  # at most
_FAILED_SECONDS = 24 * 3600.0  # after which it is tried again


def built() -> Path | None:
    """The file, if it has been built, is whole, and nobody else can have put it there."""
    made = _path()
    if made is None or not made.exists() or not _is_own(made.parent):
        return None
    if not _is_whole(made):  # cut off by a full disk, say; to load it would end this process
        made.unlink(missing_ok=True)
        return None
    return made


def build() -> bool:
    """Build it now, if that was not done, and wait for it; whether it is there."""
    if built() is None and (made := _path()) is not None:
        subprocess.run(_command(made), check=False)
    return built() is not None


def build_beside() -> None:
    """Have it built for later, if that was not done, by a process that may outlive this one."""
    made = _path()
    if made is None or made.exists() or _failed_lately(made) or not _compiler():
        return
    nothing = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_RDWR, 0) for descriptor in range(3)]
    with contextlib.suppress(OSError):
        os.posix_spawn(sys.executable, _command(made), os.environ, file_actions=nothing, setsid=True)


def _path() -> Path | None:
    """Where the file is or would be; None where there is no such place."""
    folder = os.environ.get(CACHE)
    if folder == "" or not sys.platform.startswith("linux"):
        return None
    try:
        at = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "qprune")
    except RuntimeError:  # no home
        return None
    return at / f"nodes-{_digest()}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _is_own(folder: Path) -> bool:
    """Whether only this user can put files into `folder`."""
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _seal(made: Path) -> None:
    """Put a checksum at the end, where a loader does not look."""
    content = made.read_bytes()
    made.write_bytes(content + hashlib.sha256(content).digest())


def _is_whole(made: Path) -> bool:
    content = made.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@cache
def _digest() -> str:
    """Names all that the built file depends on."""
    made_from = (_SOURCE.read_bytes(), torch.__version__, torch.version.git_version, sysconfig.get_platform(), *_FLAGS)
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]


def _compiler() -> list[str]:
    """The command of a compiler for C++: `CXX`, which may be several words, or what the system has; else nothing."""
    with contextlib.suppress(ValueError):  # quotes that do not close
        words = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
        return words if shutil.which(words[0]) else []
    return []


def _complaint(made: Path) -> Path:
    """Where it is said why nothing could be built."""
    return made.with_name(f"{made.name}.log")


def _failed_lately(made: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - _complaint(made).stat().st_mtime < _FAILED_SECONDS
    return False


def _command(made: Path) -> list[str]:
    # -P: whatever modules lie in the folder that somebody happens to be in are not to be met
    return [sys.executable, "-P", "-m", __spec__.name, str(made)]


def _work(made: Path) -> None:
    """What the process that builds does: compile, try, and only then put it in its place."""
    try:
        made.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(made.parent):
            return
    except OSError:
        return
    with FileLock(made.parent / "lock"):  # let go when this process ends, however it does
        if made.exists() or _failed_lately(made):
            return
        for left in made.parent.glob(f"{_BUILDING}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=made.parent) as folder:
            tried, complaint = Path(folder, made.name), _complaint(made)
            problem = _compile(tried)
            complaint.write_text(problem or "it ended the process that tried it\n", encoding="utf-8")
            if problem:
                return
            if not _agrees(tried):
                complaint.write_text("what it computes is not what the function in Python does\n", encoding="utf-8")
                return
            _seal(tried)
            tried.replace(made)
            complaint.unlink()


def _compile(to: Path) -> str:
    """Compile and link; what went wrong, if anything did."""
    at_torch = Path(torch.__file__).parent
    headers = [f"-I{at_torch / 'include'}", f"-I{sysconfig.get_path('include')}"]
    command = [*_compiler(), *_FLAGS, *headers, str(_SOURCE), "-o", str(to), f"-L{at_torch / 'lib'}", *_LIBRARIES]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", timeout=_COMPILERS_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{shlex.join(command)}\n{error}"
    return f"{shlex.join(command)}\n{done.stderr}" if done.returncode else ""


def _agrees(tried: Path) -> bool:
    """Whether the bits are those of the function in Python, forward and backward, on a sample."""
    from qprune.compression import kernels, nodes
    from qprune.compression.functional import prune
    from qprune.compression.straight_through import quantize_checked

    if not kernels.load():
        return False
    generator = torch.Generator().manual_seed(0)
    x, upstream = (40 * torch.randn(4, 6, 5, 5, generator=generator) for _ in range(2))
    mask = (torch.rand(6, 5, 5, generator=generator) > 0.5).float()
    one, many, bounds = torch.tensor(3, dtype=torch.int32), torch.arange(6, dtype=torch.int32), (-128, 127)
    ways = (
        lambda y: quantize_checked(y, bounds, one, "nearest", "clip_value", None, mask, True, True, rectify=True),
        lambda y: quantize_checked(y, bounds, one, "trunc", "clip_value", None, mask, True),
        lambda y: quantize_checked(y, bounds, many, "floor", "clip_value", 1, None, False),
        lambda y: prune(y, mask, in_place=True),
    )
    found = []
    for node in (None, nodes.loaded(tried)):
        nodes._operate = node
        for way in ways:
            leaf = x.clone().requires_grad_()
            out = way(leaf * 1.0)
            out.backward(upstream)
            assert leaf.grad is not None
            assert out.grad_fn is not None
            found.append((out.detach(), leaf.grad, "Operate" in out.grad_fn.name()))
    pairs = zip(found[: len(ways)], found[len(ways) :], strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and b[2] for a, b in pairs)


if __name__ == "__main__":
    os.nice(19)
    with contextlib.suppress(OSError):  # only what the training leaves: its threads wait for one another
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    from qprune.compression import node_builder  # this module's ordinary self, whose globals others see

    node_builder._work(Path(sys.argv[1]))
