"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch
from qprune.experiment.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_memory()
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc is told")
def test_large_buffers_are_faulted_in_once() -> None:
    def faults(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # A step allocates some twenty buffers of 4 MiB, 1,024 pages each; how many of them glibc gives back by default
    # depends on the order of their sizes, so only a part is asked for.
    kept, default = faults("keep"), faults("default")
    assert default > 5 * 4 * 1024
    assert kept < default / 10
