"""Section `together`: several small runs on one machine at once, and one run over several processes."""

from __future__ import annotations

import time
from multiprocessing import get_context
from multiprocessing.pool import Pool

from bench.contenders import ours
from bench.report import table


def _steps(threads: int, count: int) -> float:
    import torch

    from qprune.compression import kernels
    from qprune.experiment.memory import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    kernels.load()
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
