"""The environment of a run, kept beside its row: versions, machine, commit, data."""

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
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    commit = done.stdout.strip()
    return {"commit": commit.removesuffix("-dirty"), "changed": commit.endswith("-dirty")}
