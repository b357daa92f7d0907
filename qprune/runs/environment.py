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

    def output(*arguments: str) -> str:
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 10}
        return str(subprocess.run(["git", *arguments], cwd=Path(__file__).parent, **options).stdout).strip()

    try:
        changed = output("status", "--porcelain", "--untracked-files=no")
        return {"commit": output("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
