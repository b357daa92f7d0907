"""What becomes of memory that training frees, and of what pages it is made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qprune.training import allocator as memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc and Linux are told")

_FAULTS = """
import resource, sys, torch
from qprune.training import allocator as memory
torch.set_num_threads(1)
assert getattr(memory, sys.argv[1])()
net = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Conv2d(16, 16, 1), torch.nn.ReLU()) for _ in range(6)])
x = torch.randn(16, 16, 64, 64)
def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        net(x).square().mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(20):  # until the heap is as large as a step needs: which step first fits depends on its holes
    if not faults(1):
        break
print(faults(5))
"""

_RESIDENT = """
import sys, torch
from qprune.training import allocator as memory
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4 // 1024
torch.set_num_threads(1)
assert getattr(memory, sys.argv[1])()
large, small = [], []
for _ in range(32):
    large.append(torch.ones(1 << 20))
    small.append(torch.ones(1 << 10))  # between two large ones, so that the heap cannot shrink
before = resident()
large.clear()
print(before - resident())
"""

_HUGE = """
import sys
from qprune.training import allocator as memory
memory.prefer_huge_pages()
import torch
torch.set_num_threads(1)
x = torch.ones(16 << 20)
with open("/proc/self/smaps_rollup") as file:
    print(next(line.split()[1] for line in file if line.startswith("AnonHugePages")))
"""


def _printed(program: str, *arguments: str, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != memory.HUGE_PAGES} | environment,
    )
    return int(done.stdout)


def test_kept_memory_is_faulted_in_once() -> None:
    kept, returned = (_printed(_FAULTS, name) for name in ("keep_freed_memory", "return_freed_memory"))
    # A step makes some twenty tensors of 4 MiB, 1,024 pages each.
    assert returned > 5 * 20 * 1024
    assert kept < returned / 10


def test_returned_memory_leaves_the_process() -> None:
    # 32 tensors of 4 MiB
    assert _printed(_RESIDENT, "return_freed_memory") >= 120
    assert _printed(_RESIDENT, "keep_freed_memory") <= 8


def _on_request() -> bool:
    """Whether this Linux gives huge pages to those who ask for them, and to nobody else."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[madvise]" in setting.read_text(encoding="ascii")


@pytest.mark.skipif(not _on_request(), reason="this Linux gives huge pages to all or to none")
def test_large_tensors_are_made_of_huge_pages_unless_the_user_says_no() -> None:
    assert _printed(_HUGE) >= 32 << 10  # of 64 MiB, in kB
    assert _printed(_HUGE, **{memory.HUGE_PAGES: "0"}) == 0


@pytest.mark.parametrize(
    ("keep", "pack_features", "kept"),
    [
        (None, False, True),
        (None, True, False),
        (True, False, True),
        (True, True, True),
        (False, False, False),
        (False, True, False),
    ],
)
def test_packed_features_return_memory_unless_told_otherwise(
    keep: bool | None, pack_features: bool, kept: bool
) -> None:
    assert memory.is_kept(keep, pack_features) is kept
