"""Section `gpu`: MobileNetV2 on a GPU, steps per second against float, eager and compiled. Needs one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from bench.contenders import task_of, timeline, with_operators
from bench.report import table


def gpu(threads: int, rounds: int) -> str:
    """All ways in turn, in one process; times between synchronisations, over 20 steps each."""
    import torch

    if not torch.cuda.is_available():
        return "No GPU here: run `make bench-gpu` on a machine with one."
    torch.backends.cudnn.benchmark = True
    ways = {
        f"{name}, {precision}{', compiled' if compiled else ''}": _cuda_step(mode, precision, compiled)
        for precision in ("float32", "bfloat16")
        for compiled in (False, True)
        for name, mode in (("float", "float"), ("ours P+Q", "active"))
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, step in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                step()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) / 20)
    rows = []
    for name, taken in times.items():
        base = times[name.replace("ours P+Q", "float")]
        ratio = statistics.median(a / b for a, b in zip(taken, base, strict=True))
        seconds = statistics.median(taken)
        rows.append([name, f"{1e3 * seconds:.2f}", f"{1 / seconds:.1f}", f"{ratio:.3f}", f"{seconds * 97750 / 60:.1f}"])
    copy = _copy_rate()
    return f"A copy moves {copy:.0f} GB/s (read and written).\n\n" + table(
        ["step", "ms", "steps a second", "against float", "minutes for 250 epochs"], rows
    )


def _cuda_step(mode: str, precision: str, compiled: bool) -> Callable[[], Any]:
    import torch

    from qprune.training.compile import compile_training
    from qprune.training.distributed import autocast

    device = torch.device("cuda")
    recipe, task = task_of("cifar")
    task.to(device)
    size = task.train_batches.batch_size
    compressor = None if mode == "float" else with_operators(recipe, task, timeline(mode, size, 16 * size))
    task.to(device)
    optimizers = task.optimizers()
    if compiled:
        compile_training(task, optimizers, device)
    task.begin_epoch(0)
    task.train()
    batch, count = next(task.train_batches.epoch(0)), 0

    def step() -> None:
        nonlocal count
        if compressor is not None and count < 5:
            compressor.at(count)
        count += 1
        with autocast(device, precision):
            task.train_step(batch)

    for _ in range(8):
        step()
    return step


def _copy_rate() -> float:
    import torch

    x = torch.empty(1 << 28, device="cuda")
    y = torch.empty_like(x)
    y.copy_(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        y.copy_(x)
    torch.cuda.synchronize()
    return 10 * 2 * 4 * x.numel() / (time.perf_counter() - start) / 1e9
