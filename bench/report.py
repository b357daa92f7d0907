"""What was measured, as Markdown: sections that are replaced one by one, so that a part can be measured again."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

TITLE = "# What training costs\n\nWritten by `make bench`; `make bench ARGS=cifar` measures one section again.\n"

DISTURBED = 5.0  # percent of the CPU that others may have before figures are called so


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(foreign: float, seconds: float) -> str:
    """The machine, the versions, and how undisturbed the measurement was."""
    import torch

    from qprune.compression import node_cache

    versions = {name: _version(name) for name in ("torch", "torchvision", "qsparse")}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    compilers = [
        name
        for name, there in (
            ("a C compiler", shutil.which("cc") or shutil.which("gcc")),
            ("operators built in C++", node_cache.built()),
        )
        if there
    ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"{os.cpu_count()} cores, {_processor()}, {gpu}, {torch.backends.cpu.get_cpu_capability()}; Python "
        f"{platform.python_version()}, {listed}, {', '.join(compilers) or 'no compiler'}; qprune at {commit}. "
        f"Took {seconds:.0f} s, in which others had {foreign:.1f} % of the CPU"
        f"{': **disturbed**, to be measured again' if foreign > DISTURBED else ''}."
    )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()


def replace_section(path: Path, name: str, title: str, body: str, order: Sequence[str]) -> None:
    """Put a section into the file, in the place that `order` gives it, and keep the others."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)(?=\n<!-- \w+ -->|\Z)", text, flags=re.DOTALL))
    sections[name] = f"## {title}\n\n{body}\n"
    parts = [f"<!-- {key} -->\n{sections[key].strip()}\n" for key in order if key in sections]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([TITLE, *parts]), encoding="utf-8")
