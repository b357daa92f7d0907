"""Random numbers that depend on a seed and a purpose alone, never on what was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for one purpose of a run: the same everywhere, unrelated for different purposes."""
    words = "/".join(str(word) for word in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Make a generator on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


@contextmanager
def seeded(seed: int, *purpose: str | int) -> Iterator[None]:
    """Seed torch's global CPU generator for `purpose`, then restore its state."""
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would reseed the accelerators as well
        torch.default_generator.manual_seed(derived_seed(seed, *purpose))
        yield
