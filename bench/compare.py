"""Compare training steps, two at a time: in turns, in a process of their own."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils.benchmark import Timer

from bench.steps import Step, ours, qsparse, torch_ao
from qprune.compression.fake_quantize import use_native
from qprune.training.allocator import keep_freed_memory

Build = Callable[[], Step]


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    threads: int  # CPU threads of a process
    rounds: int  # turns of each of two steps, per process
    steps: int = 2  # per turn; two more precede them, which do not count
    processes: int = 1  # per pair: where buffers lie makes all steps of a process some percent faster or slower


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepare(threads: int) -> None:
    """Give this process what `qprune run` has: threads, memory that is kept, the native operator."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    keep_freed_memory()
    use_native()


def take_turns(base: Build, other: Build, settings: Settings) -> list[tuple[float, float]]:
    """Measure the seconds of a step of `base` and of one of `other`, turn by turn."""
    prepare(settings.threads)
    threads, steps = settings.threads, settings.steps
    first, second = (Timer("step()", globals={"step": build()}, num_threads=threads) for build in (base, other))
    return [(first.timeit(steps).mean, second.timeit(steps).mean) for _ in range(settings.rounds)]


def ratios(pairs: dict[str, tuple[Build, Build]], settings: Settings, base: str) -> str:
    """Compare pairs of steps and write a table; a pair that fails has its error in its row."""
    rows = []
    for name, pair in pairs.items():
        try:
            turns = [turn for _ in range(settings.processes) for turn in alone(take_turns, *pair, settings)]
        except Exception as error:
            rows.append([name, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}", "", "", ""])
            continue
        low, middle, high = statistics.quantiles([second / first for first, second in turns], n=4, method="inclusive")
        ms = [f"{1e3 * statistics.median(seconds):,.4g}" for seconds in zip(*turns, strict=True)]
        rows.append([name, *ms, f"{middle:.3f}", f"{low:.3f}-{high:.3f}"])
    each = f"{settings.rounds} turns of {settings.steps} steps in {settings.processes} processes per line"
    columns = ["step", f"{base}, ms", "it, ms", "ratio", "middle half"]
    return f"{each}; medians, and quartiles of the ratio.\n\n{table(columns, rows)}"


def _of(name: str, settings: Settings) -> Settings:
    """The settings of a network: a step of ESPCN takes milliseconds, one of MobileNetV2 half a second."""
    return settings if name == "cifar" else replace(settings, steps=50 * settings.steps, processes=2)


def network(name: str, settings: Settings) -> str:
    """Compare steps of a network with its best eager float step."""
    others: dict[str, Build] = {
        "P+Q": partial(ours, name),
        "P+Q, without a C compiler": partial(ours, name, "active", "no compiler"),
        "P+Q, compiled": partial(ours, name, "active", "compiled"),
        **{mode: partial(ours, name, mode) for mode in ("idle", "observing masks", "observing fraction bits")},
    }
    base = partial(ours, name, "float")
    return ratios({key: (base, other) for key, other in others.items()}, _of(name, settings), "eager float")


def peers(settings: Settings) -> str:
    """Compare steps of peers with qprune's P+Q, with memory kept for all."""
    parts = []
    for name, title in (("cifar", "MobileNetV2"), ("espcn", "ESPCN")):
        others = {
            "qsparse 2.0.1, P+Q (it refuses channels last)": partial(qsparse, name),
            "torch.ao fake quantization, Q alone": partial(torch_ao, name),
        }
        pairs: dict[str, tuple[Build, Build]] = {key: (partial(ours, name), other) for key, other in others.items()}
        parts.append(f"{title}: {ratios(pairs, _of(name, settings), 'P+Q')}")
    return "\n\n".join(parts)


def gpu(settings: Settings) -> str:
    """Compare P+Q of MobileNetV2 with float on a GPU, eager and compiled."""
    if not torch.cuda.is_available():
        return "No GPU here: run `make bench-gpu` on a machine with one."
    pairs: dict[str, tuple[Build, Build]] = {}
    for how in ("eager", "compiled"):
        for precision in ("float32", "bfloat16"):
            base, other = (partial(ours, "cifar", mode, how, "cuda", precision) for mode in ("float", "active"))
            pairs[f"P+Q, {precision}, {how}"] = base, other
    return ratios(pairs, replace(settings, steps=10 * settings.steps), "float")
