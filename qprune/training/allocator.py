"""What becomes of memory that training frees, on a CPU: it is kept for the next step, or returned to the system.

By default glibc hands large buffers back to the system and pays page faults for fresh ones in every step, a third of
the time of a step of MobileNetV2 on a CPU. Whether it does for a buffer depends on what was freed before, so it neither
keeps memory nor returns it reliably.
"""

from __future__ import annotations

import ctypes
import os
import sys

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch's variable: transparent huge pages

# From glibc's malloc.h.
_M_MXFAST, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = 1, -1, -3, -4
_MMAP_MAX = 65536  # glibc's default
# Smaller buffers stay in the heap: a call of the system for each would cost more than they take.
_RETURNED = 1 << 20


def is_kept(keep: bool | None, pack_features: bool) -> bool:
    """What `trainer.keep_memory` comes to. None: keep it, unless features are packed, which is to save memory."""
    return not pack_features if keep is None else keep


def prefer_huge_pages() -> None:
    """Have torch ask Linux for pages of 2 MiB for large buffers: where they are returned, 512 times fewer page faults.

    Torch looks at this once, when it makes its first tensor, and what the user has set in the environment holds. Where
    memory is kept, faults are few, and a heap of buffers on bounds of 2 MiB has more gaps.
    """
    os.environ.setdefault(HUGE_PAGES, "1")


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed memory while this process lives; False where there is no glibc to tell."""
    # No buffer from mmap, which would go back at once; never trim the heap (-1 is the largest threshold there is). No
    # lists of small chunks beside each thread's own: with every large buffer that is freed, they would be walked.
    return _tell((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_MXFAST, 0))


def return_freed_memory() -> bool:
    """Have glibc return every large buffer to the system when it is freed; False where there is no glibc to tell.

    What a process takes is then what its tensors take: no gaps are left that only smaller ones fit into.
    """
    return _tell((_M_MMAP_MAX, _MMAP_MAX), (_M_MMAP_THRESHOLD, _RETURNED), (_M_TRIM_THRESHOLD, _RETURNED))


def _tell(*parameters: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(*each) for each in parameters)
