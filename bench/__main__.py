"""`make bench`: measures this machine, section by section, and writes results/bench.md."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from bench.gpu import gpu
from bench.loops import loops
from bench.parts import events, growth, operators, pipeline, startup
from bench.report import machine, replace_section
from bench.rounds import Foreign
from bench.side_by_side import ranks, together
from bench.steps import cifar, compiled, espcn, layouts, memory, peers, phases
from qprune.compression import node_cache

SECTIONS: dict[str, tuple[str, Callable[[int, int], str]]] = {
    "cifar": ("A training step of MobileNetV2, batch 128", cifar),
    "peers": ("The same by peers", peers),
    "phases": ("The same in the phases of a run", phases),
    "compiled": ("The same, compiled", compiled),
    "espcn": ("A training step of ESPCN, batch 16", espcn),
    "layouts": ("Layouts", layouts),
    "memory": ("Peak memory", memory),
    "events": ("Events", events),
    "operators": ("Operators against a copy", operators),
    "pipeline": ("Data", pipeline),
    "loops": ("A whole run of ESPCN", loops),
    "together": ("Several runs at once", together),
    "ranks": ("One run over several processes", ranks),
    "startup": ("The command line", startup),
    "growth": ("How cost grows", growth),
    "gpu": ("On a GPU", gpu),
}


def main() -> None:
    """Measure the sections named (all without a GPU, if none is) and put each into the file when it is done."""
    parser = argparse.ArgumentParser(prog="make bench", description=main.__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=4, help="interleaved rounds of the longest section (default 4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parser.add_argument("--out", type=Path, default=Path("results/bench.md"), help="default: results/bench.md")
    given = parser.parse_args()
    for name in given.sections:
        if name not in SECTIONS:
            parser.error(f"{name!r} is not a section; give some of {', '.join(SECTIONS)}")
    node_cache.build()  # what a first run has built, for the runs after it
    for name in given.sections or [name for name in SECTIONS if name != "gpu"]:
        title, measure = SECTIONS[name]
        foreign, start = Foreign(), time.monotonic()
        body = measure(given.threads, given.rounds)
        body += f"\n\n{machine(foreign.share(), time.monotonic() - start)}"
        replace_section(given.out, name, title, body, list(SECTIONS))
        print(f"\n## {title}\n\n{body}", flush=True)


if __name__ == "__main__":
    main()
