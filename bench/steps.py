"""Sections `cifar`, `espcn` and `memory`: whole training steps, ours against float and against peers."""

from __future__ import annotations

import resource
from multiprocessing import get_context
from typing import Any

from bench.contenders import ours, qsparse_step, torch_step
from bench.report import table
from bench.rounds import Arena, Contender, Timing


def cifar(threads: int, rounds: int) -> str:
    """MobileNetV2 at batch 128: every way to take one step."""
    contenders = [
        Contender("float, ordinary loop (NCHW, default allocator)", ours, ("cifar", "float", "contiguous"), keep=False),
        Contender("qsparse 2.0.1 P+Q, ordinary", qsparse_step, ("cifar", "contiguous"), keep=False),
        Contender("torch fake quantization, ordinary", torch_step, ("cifar", "contiguous"), keep=False),
        Contender("float, NCHW", ours, ("cifar", "float", "contiguous")),
        Contender("float, channels last", ours, ("cifar", "float")),
        Contender("float, channels last, compiled", ours, ("cifar", "float", "own", "compiled")),
        Contender("ours P+Q, as `qprune run` trains", ours, ("cifar", "active")),
        Contender("ours P+Q, without a C compiler", ours, ("cifar", "active", "own", "plain")),
        Contender("ours P+Q, compiled", ours, ("cifar", "active", "own", "compiled")),
        Contender("ours P+Q, packed features", ours, ("cifar", "active", "own", "packed")),
        Contender("ours, pruned only", ours, ("cifar", "prune")),
        Contender("ours, idle", ours, ("cifar", "idle")),
        Contender("ours, masks being collected", ours, ("cifar", "masks")),
        Contender("ours, decimals being collected", ours, ("cifar", "decimals")),
        Contender("qsparse 2.0.1 P+Q, channels last", qsparse_step, ("cifar", "channels_last")),
        Contender("torch fake quantization, channels last", torch_step, ("cifar", "channels_last")),
    ]
    with Arena(threads) as arena:
        timings = arena.race(contenders, rounds, warm=1)
    return _steps(timings, contenders[0].name, "float, channels last", "float, channels last, compiled", rounds)


def espcn(threads: int, rounds: int) -> str:
    """ESPCN at batch 16."""
    rounds *= 40
    contenders = [
        Contender("float, ordinary loop (default allocator)", ours, ("espcn", "float"), keep=False),
        Contender("qsparse 2.0.1 P+Q, ordinary", qsparse_step, ("espcn", "contiguous"), keep=False),
        Contender("float", ours, ("espcn", "float")),
        Contender("float, compiled", ours, ("espcn", "float", "own", "compiled")),
        Contender("ours P+Q, as `qprune run` trains", ours, ("espcn", "active")),
        Contender("ours P+Q, without a C compiler", ours, ("espcn", "active", "own", "plain")),
        Contender("ours P+Q, compiled", ours, ("espcn", "active", "own", "compiled")),
        Contender("ours P+Q, packed features", ours, ("espcn", "active", "own", "packed")),
        Contender("ours, idle", ours, ("espcn", "idle")),
        Contender("ours, masks being collected", ours, ("espcn", "masks")),
        Contender("qsparse 2.0.1 P+Q", qsparse_step, ("espcn", "contiguous")),
        Contender("torch fake quantization", torch_step, ("espcn", "contiguous")),
    ]
    with Arena(threads) as arena:
        timings = arena.race(contenders, rounds, warm=20)
    return _steps(timings, contenders[0].name, "float", "float, compiled", rounds)


def _steps(timings: dict[str, Timing], ordinary: str, eager: str, compiled: str, rounds: int) -> str:
    rows = []
    for name, timing in timings.items():
        if timing.problem:
            rows.append([name, timing.problem, "", "", "", ""])
            continue
        ratios = [timing.against(timings[base]) for base in (ordinary, eager, compiled)]
        rows.append([name, f"{timing.median:,.4g}", timing.spread, *ratios])
    head = ["step", "ms", "middle half", "against ordinary", "against best eager float", "against compiled float"]
    return (
        f"{rounds} interleaved rounds; ms is the median, ratios are medians over rounds. Memory is kept but where a "
        f"line says otherwise.\n\n{table(head, rows)}"
    )


_VARIANTS = (
    ("float", ("cifar", "float")),
    ("ours P+Q", ("cifar", "active")),
    ("ours P+Q, without a C compiler", ("cifar", "active", "own", "plain")),
    ("ours P+Q, packed features", ("cifar", "active", "own", "packed")),
)


def memory(threads: int, rounds: int) -> str:
    """Peak memory of MobileNetV2's training, each variant in processes of its own, above what imports take."""
    rows: list[list[str]] = []
    floats: dict[bool, float] = {}
    for keep in (True, False):
        for name, arguments in _VARIANTS:
            with get_context("spawn").Pool(1) as pool:
                before, peak = pool.apply(_peak, (arguments, keep, threads))
            grown = peak - before
            floats.setdefault(keep, grown)
            kind = "kept" if keep else "default"
            rows.append([name, kind, f"{grown:,.0f}", f"{grown / floats[keep]:.3f}"])
    return "Resident memory at its highest, above that before the network was made.\n\n" + table(
        ["step (channels last)", "allocator", "MB", "against float"], rows
    )


def _peak(arguments: tuple[Any, ...], keep: bool, threads: int) -> tuple[float, float]:
    import torch

    from qprune.compression import kernels
    from qprune.experiment.memory import keep_freed_memory

    torch.set_num_threads(threads)
    kernels.load()
    if keep:
        keep_freed_memory()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)  # libraries that are loaded at first use
    torch.nn.functional.conv2d(x, torch.randn(4, 3, 3, 3)).sum().backward()
    before = _resident()
    step = ours(*arguments)
    for _ in range(2):
        step()
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
