"""The environment of a run, kept beside its row: versions, machine, commit, data."""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import qprune

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "torchvision", "hydra-core", "omegaconf", "numpy", "pandas", "torchmetrics")


def describe_environment(seed: int, device: "torch.device", dataset: dict[str, str]) -> dict[str, Any]:
    """Return versions, commit, device, seed and data checksums."""
    import torch  # late: the marks of stored rows do not need it

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


def marks_of_trees(environments: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the marks of runs whose code cannot be had from this repository, for each environment."""
    trees = [environment.get("git") or {} for environment in environments]
    known = _known_commits({str(tree["commit"]) for tree in trees if "commit" in tree})
    found = []
    for tree in trees:
        marks = ["trained from a tree with uncommitted changes"] if tree.get("changed") else []
        if known is not None and "commit" in tree and str(tree["commit"]) not in known:
            marks.append(f"its commit {str(tree['commit'])[:10]} is not in this repository")
        found.append(marks)
    return found


def _known_commits(commits: set[str]) -> set[str] | None:
    """Return those that are in this repository; None where it is none, or has only a part of its history."""
    try:
        if not commits or _git_says("rev-parse", "--is-shallow-repository") != "false":
            return None
        lines = _git_says("cat-file", "--batch-check", given="\n".join(sorted(commits))).splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return {line.split()[0] for line in lines if line.split()[1:2] == ["commit"]}


def _git_says(*arguments: str, given: str = "") -> str:
    """Run git in this checkout and return what it prints."""
    command, here = ["git", *arguments], Path(__file__).parent
    done = subprocess.run(command, cwd=here, input=given, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _git() -> dict[str, Any] | None:
    """Return the commit of this checkout and whether tracked files differ from it."""
    try:
        commit = _git_says("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.removesuffix("-dirty"), "changed": commit.endswith("-dirty")}
