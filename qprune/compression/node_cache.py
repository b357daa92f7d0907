"""Where nodes.cpp is kept when it is built, and having it built: once for a version of torch, by a process of its own.

Building takes some 20 seconds of one core, too long to wait for and to do in every run. What `node_builder` makes is
kept in a folder that only this user may write to: `QPRUNE_CACHE`, or `qprune` in the user's cache folder. An empty
`QPRUNE_CACHE` says that nothing is to be built or used.
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
import time
from functools import cache
from pathlib import Path

import torch

CACHE = "QPRUNE_CACHE"  # a variable of the environment

SOURCE = Path(__file__).with_name("nodes.cpp")
_ABI = f"-D_GLIBCXX_USE_CXX11_ABI={torch.compiled_with_cxx11_abi():d}"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-s", _ABI)
_FAILED_SECONDS = 24 * 3600.0  # after which it is tried again


def built() -> Path | None:
    """The file, if it has been built, is whole, and nobody else can have put it there."""
    made = _path()
    if made is None or not made.exists() or not is_own(made.parent):
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
    if made is None or made.exists() or failed_lately(made) or not compiler():
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


def is_own(folder: Path) -> bool:
    """Whether only this user can put files into `folder`."""
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_whole(made: Path) -> bool:
    content = made.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@cache
def _digest() -> str:
    """Names all that the built file depends on."""
    made_from = (SOURCE.read_bytes(), torch.__version__, torch.version.git_version, sysconfig.get_platform(), *FLAGS)
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]


def compiler() -> list[str]:
    """The command of a compiler for C++: `CXX`, which may be several words, or what the system has; else nothing."""
    with contextlib.suppress(ValueError):  # quotes that do not close
        words = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or ""]
        return words if shutil.which(words[0]) else []
    return []


def complaint(made: Path) -> Path:
    """Where it is said why nothing could be built."""
    return made.with_name(f"{made.name}.log")


def failed_lately(made: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - complaint(made).stat().st_mtime < _FAILED_SECONDS
    return False


def _command(made: Path) -> list[str]:
    # -P: whatever modules lie in the folder that somebody happens to be in are not to be met
    return [sys.executable, "-P", "-m", "qprune.compression.node_builder", str(made)]
