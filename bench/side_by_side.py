"""Sections `together` and `ranks`: several small runs on one machine at once, and one run over several processes."""

from __future__ import annotations

import time
from multiprocessing import get_context
from multiprocessing.pool import Pool

from bench.contenders import ours, task_of, timeline, with_operators
from bench.report import table
from bench.rounds import make_ready
from qprune.training.distributed import launch


def _steps(threads: int, count: int) -> float:
    make_ready(threads)
    step = ours("espcn")
    for _ in range(20):
        step()
    start = time.perf_counter()
    for _ in range(count):
        step()
    return count / (time.perf_counter() - start)


def together(threads: int, rounds: int) -> str:
    """ESPCN P+Q at batch 16: steps per second of one process with all cores, and of one process per core."""
    count, rows = 60 * rounds, []
    for processes in (1, threads):
        with get_context("spawn").Pool(processes) as pool:
            rates = _rates(pool, processes, threads // processes, count)
        rows.append([f"{processes} x {threads // processes}", f"{sum(rates):.0f}", f"{min(rates):.0f}"])
    first, last = float(rows[0][1]), float(rows[-1][1])
    return f"A sweep that runs one process per core gets through {last / first:.2f} times the steps.\n\n" + table(
        ["processes x threads", "steps a second in all", "in the slowest process"], rows
    )


def _rates(pool: Pool, processes: int, threads: int, count: int) -> list[float]:
    return pool.starmap(_steps, [(threads, count)] * processes, chunksize=1)


def ranks(threads: int, rounds: int) -> str:
    """One run over several processes that share each batch."""
    rows = []
    for name, batch, count in (("espcn", 16, 40 * rounds), ("espcn", 256, 4 * rounds), ("cifar", 128, max(3, rounds))):
        with get_context("spawn").Pool(1) as pool:  # a process of its own, as each rank is
            one = pool.apply(_shared_steps, (name, batch, count))
        many: tuple[float, float] = launch(threads, _shared_steps, name, batch, count)
        speed = one[0] / many[0]
        rows.append(
            [f"{name}, batch {batch}", *(f"{1e3 * each:.4g}" for each in (one[0], many[0], many[1])), f"{speed:.2f}"]
        )
    head = ["P+Q", "ms, 1 process x 1 thread", f"ms, {threads} ranks x 1 thread", "of it summing gradients", "speed-up"]
    return (
        f"One run over {threads} ranks (gloo), which share each batch, against one process of as many threads as a "
        f"rank has:\n\n{table(head, rows)}"
    )


def _shared_steps(name: str, batch: int, count: int) -> tuple[float, float]:
    """Seconds of a step of this rank, and what of them goes into bringing gradients together."""
    import torch

    from qprune.compression.distributed import rank_and_world, set_batch_share
    from qprune.training.distributed import average_gradients, share_of

    make_ready(1)
    recipe, task = task_of(name, f"task.batch_size={batch}")
    compressor = with_operators(recipe, task, timeline("active", batch, batch))
    optimizers = task.optimizers()
    spent = 0.0
    began = [0.0]

    def begin(*_: object) -> None:
        began[0] = time.perf_counter()

    def end(*_: object) -> None:
        nonlocal spent
        spent += time.perf_counter() - began[0]

    for optimizer in optimizers.values():
        optimizer.register_step_pre_hook(begin)
    part, share = share_of(next(task.train_batches.epoch(0)))
    set_batch_share(share)
    average_gradients(optimizers.values())
    for optimizer in optimizers.values():
        optimizer.register_step_pre_hook(end)
    task.begin_epoch(0)
    task.train()
    for step in range(6):
        compressor.at(min(step, 3))
        task.train_step(part)
    if rank_and_world()[1] > 1:
        torch.distributed.barrier()
    spent, start = 0.0, time.perf_counter()
    for _ in range(count):
        task.train_step(part)
    return (time.perf_counter() - start) / count, spent / count
