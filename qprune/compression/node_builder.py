"""The process that builds nodes.cpp: compiles it, tries it, and only then puts it where `node_cache` finds it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

from qprune.compression import native as kernels
from qprune.compression import nodes
from qprune.compression.fake_quantize import quantize_checked
from qprune.compression.functional import prune
from qprune.compression.node_cache import FLAGS, SOURCE, compiler, complaint, failed_lately, is_own

_LIBRARIES = ("-lc10", "-ltorch_cpu", "-ltorch_python")
_BUILDING = "building-"  # names of folders
_COMPILERS_SECONDS = 300.0  # at most


def _build(made: Path) -> None:
    """Build the file `made`, unless another process has done so or failed to lately."""
    try:
        made.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_own(made.parent):
            return
    except OSError:
        return
    with FileLock(made.parent / "lock"):  # let go when this process ends, however it does
        if made.exists() or failed_lately(made):
            return
        for left in made.parent.glob(f"{_BUILDING}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=made.parent) as folder:
            tried, said = Path(folder, made.name), complaint(made)
            problem = _compile(tried)
            said.write_text(problem or "it ended the process that tried it\n", encoding="utf-8")
            if problem:
                return
            if not _agrees(tried):
                said.write_text("what it computes is not what the function in Python does\n", encoding="utf-8")
                return
            _seal(tried)
            tried.replace(made)
            said.unlink()


def _seal(made: Path) -> None:
    """Put a checksum at the end, where a loader does not look."""
    content = made.read_bytes()
    made.write_bytes(content + hashlib.sha256(content).digest())


def _compile(to: Path) -> str:
    """Compile and link; what went wrong, if anything did."""
    at_torch = Path(torch.__file__).parent
    headers = [f"-I{at_torch / 'include'}", f"-I{sysconfig.get_path('include')}"]
    command = [*compiler(), *FLAGS, *headers, str(SOURCE), "-o", str(to), f"-L{at_torch / 'lib'}", *_LIBRARIES]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace", timeout=_COMPILERS_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{shlex.join(command)}\n{error}"
    return f"{shlex.join(command)}\n{done.stderr}" if done.returncode else ""


def _agrees(tried: Path) -> bool:
    """Whether the bits are those of the function in Python, forward and backward, on a sample."""
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
    _build(Path(sys.argv[1]))
