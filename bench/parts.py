"""Sections `operators`, `events`, `pipeline`, `startup` and `growth`: what a step is made of, and how cost grows."""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.contenders import NEVER, ours, task_of, with_operators
from bench.report import table
from bench.rounds import Arena, Contender, make_ready


def _ms(function: Callable[[], Any], rounds: int) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def operators(threads: int, rounds: int) -> str:
    """One operator on one tensor, against a copy of the same bytes."""
    import torch

    from qprune.compression import native as kernels
    from qprune.compression.functional import prune, quantize
    from qprune.compression.pruner import Pruner

    make_ready(threads)
    rows = []
    for shape in ((16, 64, 17, 17), (128, 192, 16, 16), (128, 96, 32, 32)):
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        mask = (torch.rand_like(x[0]) > 0.5).float()
        d, out, grad = torch.tensor(5, dtype=torch.int32), torch.empty_like(x), torch.randn_like(x).mul_(0.01)
        through_relu, pruner = grad * mask, Pruner()
        pruner.size_for_feature(x)
        copy = _ms(lambda: out.copy_(x), 5 * rounds)  # noqa: B023
        cases: dict[str, Callable[[], Any]] = {
            "P+Q": lambda: quantize(x, 8, d, mask=mask),  # noqa: B023
            "P+Q in place": lambda: quantize(x, 8, d, mask=mask, in_place=True),  # noqa: B023
            "P+Q backward": lambda: kernels.clip_gradient(grad, d, None, (-128, 127), mask),  # noqa: B023
            "P+Q backward behind a ReLU": lambda: kernels.clip_gradient(
                through_relu,  # noqa: B023
                d,  # noqa: B023
                None,
                (-128, 127),
                mask,  # noqa: B023
            ),
            "P": lambda: prune(x, mask),  # noqa: B023
            "sum of magnitudes": lambda: pruner.observe(x),  # noqa: B023
            "torch.fake_quantize": lambda: torch.fake_quantize_per_tensor_affine(x, 1 / 32, 0, -128, 127),  # noqa: B023
        }
        megabytes = 4e-6 * x.numel()
        for name, case in cases.items():
            taken = _ms(case, 5 * rounds)
            plain = "-"
            if name in ("P+Q", "sum of magnitudes"):
                with kernels.unused():
                    plain = f"{_ms(case, 2 * rounds) / copy:.2f}"
            rows.append([f"{name}, {megabytes:.1f} MB", f"{taken:.3g}", f"{taken / copy:.2f}", plain])
    return table(["operator", "ms", "in copies", "by torch's functions, in copies"], rows)


def events(threads: int, rounds: int) -> str:
    """The steps at which something is decided, and the same on one large tensor."""
    import torch

    from qprune.compression.functional import magnitude_mask, optimal_decimal
    from qprune.compression.schedule import Timeline

    make_ready(threads)
    recipe, task = task_of("cifar")
    batch = task.train_batches.batch_size
    window = recipe.config.prune.window
    steps = window // batch
    times = Timeline((1, 2), steps + 2, steps + 2, window, NEVER, batch, batch)
    compressor = with_operators(recipe, task, times)
    task.optimizers()
    pictures = next(task.train_batches.epoch(0))
    rows = []
    for step in range(steps + 3):
        start = time.perf_counter()
        compressor.at(step)
        seconds = time.perf_counter() - start
        if step in (1, 2):
            rows.append([f"MobileNetV2, pruning event {step} on all sites", f"{seconds:.3f}"])
        elif step == steps + 2:
            rows.append(["MobileNetV2, decimal search of all weights and features", f"{seconds:.3f}"])
        task.train_step(pictures)
    x = torch.randn(50_000_000)
    for name, event in (
        ("mask of one tensor of 5e7 elements", lambda: magnitude_mask(x, 0.5)),
        ("decimal search on 5e7 elements", lambda: optimal_decimal(x)),
        ("the same with saturation", lambda: optimal_decimal(x, saturate=(0.0001, 0.9999))),
    ):
        start = time.perf_counter()
        event()
        rows.append([name, f"{time.perf_counter() - start:.3f}"])
    return table(["event", "seconds"], rows)


def pipeline(threads: int, rounds: int) -> str:
    """Batches per second that the data gives, against those that training takes."""
    make_ready(threads)
    rows = []
    for name in ("cifar", "espcn"):
        _, task = task_of(name)
        count = min(len(task.train_batches), 8 * rounds)
        batches, times = task.train_batches.epoch(0), []
        start = time.perf_counter()
        next(batches)
        first = time.perf_counter() - start
        for _ in range(count - 1):
            start = time.perf_counter()
            next(batches)
            times.append(time.perf_counter() - start)
        each = statistics.mean(times) + first / len(task.train_batches)
        step = _ms(ours(name), rounds) / 1e3
        rows.append([name, f"{1 / each:,.0f}", f"{1 / step:,.1f}", f"{step / each:,.0f}"])
    return table(["task", "batches a second", "training steps a second", "times training's"], rows)


def startup(threads: int, rounds: int) -> str:
    """The command line's start."""
    rows = []
    probe = (
        "import sys; from qprune.cli.main import main; code = main(['--help']); "
        "sys.exit(2 if 'torch' in sys.modules else code)"
    )
    for name, command in (
        ("`qprune --help`", [sys.executable, "-c", probe]),
        ("`qprune list tasks`", [sys.executable, "-m", "qprune.cli.main", "list", "tasks"]),
        ("`python -c 'import torch'`", [sys.executable, "-c", "import torch"]),
    ):
        taken = _ms(lambda: subprocess.run(command, check=True, capture_output=True), max(3, rounds // 2))  # noqa: B023
        rows.append([name, f"{taken / 1e3:.2f}"])
    return "The first exits with an error if torch was imported.\n\n" + table(["command", "seconds"], rows)


def growth(threads: int, rounds: int) -> str:
    """How cost grows: with the batch, the number of sites, the size of a tensor and the number of stored runs."""
    sizes = (16, 64, 256)
    contenders = [
        Contender(f"{mode} {size}", ours, ("espcn", mode, "own", "eager", size))
        for size in sizes
        for mode in ("float", "active")
    ]
    with Arena(threads) as arena:
        timings = arena.race(contenders, 10 * rounds, warm=5)
    rows = [
        [
            f"{size}",
            f"{timings[f'float {size}'].median:.3g}",
            f"{timings[f'active {size}'].median:.3g}",
            timings[f"active {size}"].against(timings[f"float {size}"]),
        ]
        for size in sizes
    ]
    parts = ["ESPCN by batch:\n\n" + table(["batch", "float ms", "ours P+Q ms", "ratio"], rows)]
    make_ready(threads)
    parts.append("By number of sites, a chain of small layers:\n\n" + _by_sites(rounds))
    parts.append("By size of a tensor:\n\n" + _by_size(rounds))
    parts.append("`qprune tables` by number of stored runs:\n\n" + _by_runs())
    return "\n\n".join(parts)


def _by_sites(rounds: int) -> str:
    import torch
    from torch import nn

    from qprune import Schedule, compress

    rows = []
    for count in (8, 32, 128):
        plain = nn.Sequential(*[nn.Conv2d(4, 4, 1) for _ in range(count)])
        chain = copy.deepcopy(plain)
        x = torch.randn(4, 4, 4, 4)
        compressor = compress(chain, x, Schedule(t_qw=2, t_qf=2, t_p=0, dt_p=1, n=1), 1, 4)
        for step in range(4):
            compressor.at(step)
            chain(x).sum().backward()
        pairs = [
            [_ms(lambda: network(x).sum().backward(), 1) for network in (plain, chain)]  # noqa: B023
            for _ in range(5 * rounds)
        ]
        added = statistics.median(ours_ms - float_ms for float_ms, ours_ms in pairs)
        timeline = iter(range(4, NEVER))
        at = _ms(lambda: compressor.at(next(timeline)), 5 * rounds)  # noqa: B023
        rows.append([f"{count}", f"{1e3 * added / (2 * count):.0f}", f"{1e3 * at / (2 * count):.1f}"])
    return table(["layers (two sites each)", "us a site and step", "us a site in `at`"], rows)


def _by_size(rounds: int) -> str:
    import torch

    from qprune.compression.functional import magnitude_mask, optimal_decimal, quantize

    rows = []
    d = torch.tensor(5, dtype=torch.int32)
    for power in (4, 5, 6, 7):
        x = torch.randn(10**power)
        times = [
            _ms(partial(function, x), rounds)
            for function in (lambda t: quantize(t, 8, d), lambda t: magnitude_mask(t, 0.5), optimal_decimal)
        ]
        rows.append([f"10^{power}", *[f"{1e6 * taken / 10**power:.3g}" for taken in times]])
    return table(["elements", "Q, ns an element", "mask, ns an element", "decimal search, ns an element"], rows)


def _by_runs() -> str:
    script = Path(__file__).parents[1] / "scripts" / "benchmark_tables.py"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(script), "1000", "3000", "10000"],
            check=True,
            capture_output=True,
            text=True,
            cwd=folder,
        )
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    head = ["runs", "seconds", "CPU seconds", "MB", "ms a run above the fewest"]
    return "Each with config, curve, row and checksums, all of them read.\n\n" + table(head, lines)
