"""Memory that training frees on a CPU, kept for the next step (`keep_memory`).

By default glibc returns large buffers to the system and pays page faults for fresh ones in every step: a third of the
time of a step of MobileNetV2.
"""

import ctypes
import sys

_M_MXFAST, _M_TRIM_THRESHOLD, _M_MMAP_MAX = 1, -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Stop glibc from returning freed memory; return False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No buffer from mmap, which would go back at once; never trim the heap (-1 is the largest threshold there is). No
    # lists of small chunks beside each thread's own: every freed large buffer would walk them.
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_MXFAST, 0))
    return mallopt is not None and all(mallopt(*option) for option in options)
