"""The environment of a run, kept beside its row: versions, machine, commit, data."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import qprune

_PACKAGES = ("torch", "torchvision", "hydra-core", "omegaconf", "numpy", "pandas", "torchmetrics")


def describe_environment(seed: int, device: torch.device, dataset: dict[str, str]) -> dict[str, Any]:
    """Return versions, commit, device, seed and data checksums."""
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "qprune": qprune.__version__,
        "arithmetic": qprune.ARITHMETIC,
        "git": _git(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "device": str(device),
        "device_name": device_name or platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "dataset": dataset,
        "command": sys.argv,
    }


def _git() -> dict[str, Any] | None:
    """Return the commit of this checkout and whether tracked files differ from it."""
    try:
        commit = _git_output("rev-parse", "HEAD")
        changed = _git_output("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changed)}


def _git_output(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
