"""Memory that training frees is kept for the next step."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from qprune.training.allocator import keep_freed_memory
torch.set_num_threads(1)
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has this switch")
def test_kept_memory_is_faulted_in_once() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    # A step makes some twenty tensors of 4 MiB, 1,024 pages each: returned memory would fault for most of them.
    assert int(done.stdout) < 5 * 20 * 1024 / 10
