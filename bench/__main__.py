"""`make bench`: measure this machine, section by section, and write results/bench.md."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from bench.compare import Settings, gpu, network, peers
from bench.runs import attaching, beside, memory, startup, whole_run
from bench.tables import tables

SECTIONS: dict[str, tuple[str, Callable[[Settings], str]]] = {
    "cifar": ("A training step of MobileNetV2, batch 128", partial(network, "cifar")),
    "espcn": ("A training step of ESPCN, batch 16", partial(network, "espcn")),
    "peers": ("Peers against qprune", peers),
    "memory": ("Peak memory of MobileNetV2", memory),
    "run": ("A whole run of ESPCN", whole_run),
    "attach": ("Attaching the operators", attaching),
    "beside": ("One step beside busy processes", beside),
    "tables": ("Tables", tables),
    "startup": ("Start of the command line", startup),
    "gpu": ("MobileNetV2 on a GPU", gpu),
}
TITLE = "# What training costs\n\nWritten by `make bench`; `make bench ARGS=espcn` measures one section again.\n"


def main() -> None:
    """Measure the sections named (by default all that need no GPU) and write each to the file when it is done."""
    parser = argparse.ArgumentParser(prog="make bench", description=main.__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3, help="turns of each step")
    parser.add_argument("--steps", type=int, default=2, help="steps per turn, of ESPCN 50 times as many")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("results/bench.md"))
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"{unknown.pop()!r} is not a section; give some of {', '.join(SECTIONS)}")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as `qprune` does, for the processes that measure
    settings = Settings(given.threads, given.rounds, given.steps)
    for name in given.sections or [name for name in SECTIONS if name != "gpu"]:
        title, measure = SECTIONS[name]
        start = time.monotonic()
        body = measure(settings)
        body += f"\n\n{machine()}; took {time.monotonic() - start:.0f} s."
        replace_section(given.out, name, title, body, list(SECTIONS))
        print(f"\n## {title}\n\n{body}", flush=True)


def machine() -> str:
    """Describe the machine and the versions."""
    installed = {each.name.lower(): each.version for each in importlib.metadata.distributions()}
    versions = ", ".join(f"{name} {installed.get(name, '-')}" for name in ("torch", "torchvision", "qsparse"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores, {device}; Python {platform.python_version()}, {versions}"


def replace_section(path: Path, name: str, title: str, body: str, order: Sequence[str]) -> None:
    """Put a section into the file, in the place that `order` gives it, and keep the others."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    sections = dict(re.findall(r"<!-- (\w+) -->\n(.*?)(?=\n<!-- \w+ -->|\Z)", text, flags=re.DOTALL))
    sections[name] = f"## {title}\n\n{body}\n"
    parts = [f"<!-- {key} -->\n{sections[key].strip()}\n" for key in order if key in sections]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([TITLE, *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
