"""Contenders that take turns: every one lives in a process of its own kind and takes some steps per round.

The allocator is a property of a process, so a contender that is measured with the system's default allocator lives in
another process than one with memory kept. While one of them works all others wait.

Large networks share these two processes, since each holds what it has freed, gigabytes of it. Small ones have a process
each (`apart`): what a compiler or a peer has left in a process makes Python slower for all that live there.
"""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


@dataclass(frozen=True)
class Contender:
    """One line of a table. `make` (a module's function) builds a step from `arguments`; `keep` memory, or not."""

    name: str
    make: Callable[..., Callable[[], Any]]
    arguments: tuple[Any, ...] = ()
    keep: bool = True


@dataclass
class Timing:
    """Milliseconds of every round; or why there are none."""

    rounds: list[float]
    problem: str = ""

    @property
    def median(self) -> float:
        """The median round in ms."""
        return statistics.median(self.rounds)

    @property
    def spread(self) -> str:
        """The middle half of the rounds, in ms."""
        low, _, high = statistics.quantiles(self.rounds, n=4)
        return f"{low:,.4g}-{high:,.4g}"

    def against(self, other: Timing) -> str:
        """The median over rounds of this one's time by the other's, in the same round."""
        if not self.rounds or not other.rounds:
            return "-"
        return f"{statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True)):.3f}"


def make_ready(threads: int) -> None:
    """Give this process what `qprune run` has on a CPU: memory that is kept, the kernels, and the nodes."""
    import torch

    from qprune.compression import native as kernels
    from qprune.compression import nodes
    from qprune.training.allocator import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    kernels.load()
    nodes.load()


def _serve(pipe: Connection, keep: bool, threads: int) -> None:
    import torch

    if keep:
        make_ready(threads)
    else:
        torch.set_num_threads(threads)
    steps: dict[str, Callable[[], Any]] = {}
    while True:
        word, *rest = pipe.recv()
        try:
            if word == "make":
                name, make, arguments = rest
                steps[name] = make(*arguments)
                pipe.send(None)
            elif word == "step":
                name, in_a_row = rest
                if in_a_row > 1:  # the first finds caches, and threads that still spin, of another contender
                    steps[name]()
                start = time.perf_counter()
                for _ in range(max(1, in_a_row - 1)):
                    steps[name]()
                pipe.send(1e3 * (time.perf_counter() - start) / max(1, in_a_row - 1))
            else:
                pipe.send(None)
                return
        except Exception as error:  # a contender that cannot run is told in the table
            traceback.print_exc()
            pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}")


class Arena:
    """Processes of contenders, started when needed: one with memory kept and one with the default allocator.

    apart: one for each contender.
    """

    def __init__(self, threads: int, apart: bool = False) -> None:
        self.threads, self.apart = threads, apart
        self.pipes: dict[tuple[bool, str], Connection] = {}

    def _pipe(self, contender: Contender) -> Connection:
        keep = contender.keep
        key = keep, contender.name if self.apart else ""
        if key not in self.pipes:
            here, there = get_context("spawn").Pipe()
            get_context("spawn").Process(target=_serve, args=(there, keep, self.threads), daemon=True).start()
            self.pipes[key] = here
        return self.pipes[key]

    def _ask(self, contender: Contender, *words: Any) -> Any:
        pipe = self._pipe(contender)
        pipe.send(words)
        return pipe.recv()

    def race(self, contenders: Sequence[Contender], rounds: int, warm: int = 3, in_a_row: int = 1) -> dict[str, Timing]:
        """Milliseconds of each contender's steps over interleaved rounds, after `warm` rounds that do not count.

        in_a_row: steps of a turn. Of several, the first does not count and the others' mean does: for steps that take
        no longer than what a change of contenders disturbs.
        """
        timings = {contender.name: Timing([]) for contender in contenders}
        for contender in contenders:
            problem = self._ask(contender, "make", contender.name, contender.make, contender.arguments)
            timings[contender.name].problem = problem or ""
        for turn in range(warm + rounds):
            for contender in contenders:
                timing = timings[contender.name]
                if timing.problem:
                    continue
                taken = self._ask(contender, "step", contender.name, in_a_row)
                if isinstance(taken, str):
                    timing.problem, timing.rounds = taken, []
                elif turn >= warm:
                    timing.rounds.append(taken)
        return timings

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes.values():
            pipe.send(("end",))
            pipe.recv()
        self.pipes = {}

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Foreign:
    """What share of this machine's CPU others took since this was made (Linux; nan elsewhere)."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            with open("/proc/stat", encoding="ascii") as file:  # noqa: PTH123  (not a file of the project)
                fields = [int(field) for field in file.readline().split()[1:9]]
        except OSError:
            return 0.0, 0.0, time.time()
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        return busy, _own_seconds(), time.time()

    def share(self) -> float:
        """Percent of the machine's CPU time."""
        before, now = self.start, self._now()
        whole = (now[2] - before[2]) * (os.cpu_count() or 1)
        return 100 * max(0.0, (now[0] - before[0]) - (now[1] - before[1])) / whole if whole else float("nan")


def _own_seconds() -> float:
    """CPU seconds of this process and everything below it, living or gone."""
    total, tick = 0.0, os.sysconf("SC_CLK_TCK")
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="utf-8") as file:  # noqa: PTH123
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry)] = int(fields[1])
            seconds[int(entry)] = sum(map(int, fields[11:15])) / tick
    for process in seconds:
        above = process
        while above in parents and above != os.getpid():
            above = parents[above]
        total += seconds[process] if above == os.getpid() else 0.0
    return total
