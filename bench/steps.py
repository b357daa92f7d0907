"""Training steps, ours against float and against peers, and their peak memory: a section of the report each."""

from __future__ import annotations

import os
import re
import statistics
import time
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

from bench.contenders import ours, qsparse_step, torch_step
from bench.report import table
from bench.rounds import Arena, Contender, Timing
from qprune.training.allocator import prefer_huge_pages

# Steps of a turn of MobileNetV2. The first, which does not count, finds the gaps in memory that another left.
IN_A_ROW = 3

CIFAR_FLOAT = Contender("float, channels last", ours, ("cifar", "float"))


CIFAR_ORDINARY = Contender(
    "float, ordinary loop (NCHW, default allocator)", ours, ("cifar", "float", "contiguous", "ordinary"), keep=False
)
CIFAR_OURS = Contender("ours P+Q, as `qprune run` trains", ours, ("cifar", "active"))
CIFAR_BASES = {"ordinary float": CIFAR_ORDINARY, "best eager float": CIFAR_FLOAT}


def cifar(threads: int, rounds: int) -> str:
    """MobileNetV2 at batch 128: ours against float, as people write it and at its best."""
    contenders = [
        CIFAR_ORDINARY,
        Contender("float, NCHW", ours, ("cifar", "float", "contiguous")),
        CIFAR_FLOAT,
        CIFAR_OURS,
        Contender("ours P+Q, without a C compiler", ours, ("cifar", "active", "own", "plain")),
    ]
    return _race(contenders, CIFAR_BASES, threads, rounds, warm=1)


def peers(threads: int, rounds: int) -> str:
    """MobileNetV2 at batch 128: peers, in the loop that people write and with all that ours has."""
    contenders = [
        CIFAR_ORDINARY,
        CIFAR_FLOAT,
        CIFAR_OURS,
        Contender("qsparse 2.0.1 P+Q, ordinary", qsparse_step, ("cifar", "contiguous", "ordinary"), keep=False),
        Contender("qsparse 2.0.1 P+Q, NCHW", qsparse_step, ("cifar", "contiguous")),  # it refuses channels last
        Contender("torch fake quantization, ordinary", torch_step, ("cifar", "contiguous", "ordinary"), keep=False),
        Contender("torch fake quantization, channels last", torch_step, ("cifar", "channels last")),
    ]
    return _race(contenders, CIFAR_BASES, threads, max(2, rounds // 2), warm=1)


def phases(threads: int, rounds: int) -> str:
    """MobileNetV2 at batch 128 in the phases of a run."""
    contenders = [
        CIFAR_FLOAT,
        Contender("idle: attached, nothing begun", ours, ("cifar", "idle")),
        Contender("masks being collected", ours, ("cifar", "masks")),
        Contender("pruned", ours, ("cifar", "prune")),
        Contender("decimals being collected", ours, ("cifar", "decimals")),
        Contender("pruned and quantized", ours, ("cifar", "active")),
        Contender("the same, packed features (memory kept)", ours, ("cifar", "active", "own", "packed")),
    ]
    return _race(contenders, {"float": CIFAR_FLOAT}, threads, rounds, warm=1)


def compiled(threads: int, rounds: int) -> str:
    """MobileNetV2 at batch 128, `trainer.compile=true`."""
    compiled_float = Contender("float, compiled as ours", ours, ("cifar", "float", "own", "compiled"))
    contenders = [
        CIFAR_FLOAT,
        Contender("float, `torch.compile` as it comes", ours, ("cifar", "float", "own", "torch.compile")),
        compiled_float,
        CIFAR_OURS,
        Contender("ours P+Q, compiled", ours, ("cifar", "active", "own", "compiled")),
    ]
    bases = {"best eager float": CIFAR_FLOAT, "compiled float": compiled_float}
    return _race(contenders, bases, threads, rounds, warm=1, draws=4)


def espcn(threads: int, rounds: int) -> str:
    """ESPCN at batch 16."""
    ordinary = Contender(
        "float, ordinary loop (NCHW, default allocator)", ours, ("espcn", "float", "contiguous", "ordinary"), keep=False
    )
    eager = Contender("float, channels last", ours, ("espcn", "float"))
    compiled_float = Contender("float, compiled as ours", ours, ("espcn", "float", "own", "compiled"))
    contenders = [
        ordinary,
        Contender("qsparse 2.0.1 P+Q, ordinary", qsparse_step, ("espcn", "contiguous", "ordinary"), keep=False),
        Contender("float, NCHW", ours, ("espcn", "float", "contiguous")),
        eager,
        Contender("float, `torch.compile` as it comes", ours, ("espcn", "float", "own", "torch.compile")),
        compiled_float,
        Contender("ours P+Q, as `qprune run` trains", ours, ("espcn", "active")),
        Contender("ours P+Q, NCHW", ours, ("espcn", "active", "contiguous")),
        Contender("ours P+Q, without a C compiler", ours, ("espcn", "active", "own", "plain")),
        Contender("ours P+Q, compiled", ours, ("espcn", "active", "own", "compiled")),
        Contender("ours P+Q, packed features", ours, ("espcn", "active", "own", "packed")),
        Contender("ours, idle", ours, ("espcn", "idle")),
        Contender("ours, masks being collected", ours, ("espcn", "masks")),
        Contender("qsparse 2.0.1 P+Q, NCHW", qsparse_step, ("espcn", "contiguous")),  # it refuses channels last
        Contender("torch fake quantization, channels last", torch_step, ("espcn", "channels last")),
    ]
    bases = {"ordinary float": ordinary, "best eager float": eager, "compiled float": compiled_float}
    return _race(contenders, bases, threads, rounds, warm=1, in_a_row=101, draws=4, apart=True)


def layouts(threads: int, rounds: int) -> str:
    """P+Q of the other tasks with channels first and last."""
    contenders = [
        Contender(f"{title}, {layout}", ours, (name, "active", layout))
        for name, title in _OTHERS.items()
        for layout in ("contiguous", "channels last")
    ]
    with Arena(threads) as arena:
        timings = arena.race(contenders, max(2, rounds // 2), warm=1)
    rows = []
    for title in _OTHERS.values():
        first, last = (timings[f"{title}, {layout}"] for layout in ("contiguous", "channels last"))
        shown = [timing.problem or f"{timing.median:,.4g}" for timing in (first, last)]
        rows.append([title, *shown, last.against(first)])
    return table(["P+Q", "ms, channels first", "ms, channels last", "ratio"], rows)


_OTHERS = {"pix2pix": "Pix2Pix", "cyclegan": "CycleGAN", "faster_rcnn": "Faster R-CNN on synthetic pictures"}


def _race(
    contenders: list[Contender],
    bases: dict[str, Contender],
    threads: int,
    rounds: int,
    warm: int,
    in_a_row: int = IN_A_ROW,
    draws: int = 1,
    apart: bool = False,
) -> str:
    """A table of medians, with ratios to `bases`, which have names of their own at the heads of columns.

    draws: new processes so many times, each for `rounds` rounds. Where a process's buffers happen to lie in memory
    makes its steps some percent faster or slower throughout.
    """
    timings = {contender.name: Timing([]) for contender in contenders}
    for _ in range(draws):
        with Arena(threads, apart) as arena:
            for name, drawn in arena.race(contenders, rounds, warm, in_a_row).items():
                timings[name].rounds += drawn.rounds
                timings[name].problem = timings[name].problem or drawn.problem
    for timing in timings.values():
        if timing.problem:  # in one set of processes at least: no other line can be compared with it
            timing.rounds = []
    rows = []
    for name, timing in timings.items():
        if timing.problem:
            rows.append([name, timing.problem, *[""] * (1 + len(bases))])
            continue
        ratios = [timing.against(timings[base.name]) for base in bases.values()]
        rows.append([name, f"{timing.median:,.4g}", timing.spread, *ratios])
    kept = "" if all(contender.keep for contender in contenders) else " Memory is kept but in the `ordinary` lines."
    each = "" if in_a_row == 1 else f" of {in_a_row} steps each, of which the first does not count"
    times = "" if draws == 1 else f", in each of {draws} sets of processes"
    alone = ", each line in a process of its own" if apart else ""
    return (
        f"{rounds} interleaved rounds{each}{times}{alone}; ms is the median, ratios are medians over rounds.{kept}\n\n"
        f"{table(['step', 'ms', 'middle half', *[f'against {base}' for base in bases]], rows)}"
    )


# Processes, with memory kept and returned: which gaps a heap has is a matter of luck, and returned there are none.
_DRAWS = {True: 7, False: 1}
_VARIANTS = (
    ("float", ("cifar", "float")),
    ("ours P+Q", ("cifar", "active")),
    ("ours P+Q, without a C compiler", ("cifar", "active", "own", "plain")),
    ("ours P+Q, packed features", ("cifar", "active", "own", "packed")),
)


def memory(threads: int, rounds: int) -> str:
    """Peak memory of MobileNetV2's training, each variant in processes of its own, above what imports take."""
    rows: list[list[str]] = []
    floats: list[float] = []
    for name, arguments in _VARIANTS:
        measured = []
        for keep in (True, False):
            drawn = [_peak_in_new_process(arguments, keep, threads, rounds) for _ in range(_DRAWS[keep])]
            measured.append([statistics.median(values) for values in zip(*drawn, strict=True)])
        peaks = [peak for peak, _ in measured]
        floats = floats or peaks
        row = [name]
        for (peak, ms), base in zip(measured, floats, strict=True):
            row += [f"{peak:,.0f}", f"{peak / base:.3f}", f"{ms:,.0f}"]
        rows.append(row)
    columns = [f"{what}{how}" for how in ("kept", "returned") for what in ("MB, ", "against float, ", "ms a step, ")]
    return (
        "Resident memory at its highest, above that before the network was made: of the whole process with freed "
        "memory kept, as `qprune run` has it; and of steps in this state alone with freed memory returned at once, as "
        "`trainer.keep_memory=false` has it and `trainer.pack_features=true` by itself. Kept: medians "
        f"of {_DRAWS[True]} processes, since which gaps a heap happens to have makes one some percent larger or "
        "smaller.\n\n" + table(["step (channels last)", *columns], rows)
    )


def _peak_in_new_process(arguments: tuple[Any, ...], keep: bool, *rest: int) -> tuple[float, float]:
    """`_peak` in a process that asks for the pages that `qprune run` asks for: by its environment."""
    with patch.dict(os.environ):
        if not keep:
            prefer_huge_pages()
        with get_context("spawn").Pool(1) as pool:
            return pool.apply(_peak, (arguments, keep, *rest))


def _peak(arguments: tuple[Any, ...], keep: bool, threads: int, rounds: int) -> tuple[float, float]:
    """MB at most, and the median ms of a step."""
    import torch

    from qprune.compression import native as kernels
    from qprune.compression import nodes
    from qprune.training.allocator import keep_freed_memory, return_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory() if keep else return_freed_memory()
    kernels.load()
    nodes.load()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)  # libraries that are loaded at first use
    torch.nn.functional.conv2d(x, torch.randn(4, 3, 3, 3)).sum().backward()
    before = _resident("VmRSS")
    step = ours(*arguments)
    if not keep:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write("5")  # the highest so far is that of now
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return _resident("VmHWM") - before, statistics.median(times[1:])


def _resident(line: str) -> float:
    """A line of this process's status, in MB."""
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        return int(re.search(rf"^{line}:\s*(\d+) kB", file.read(), re.MULTILINE)[1]) / 1024  # type: ignore[index]
