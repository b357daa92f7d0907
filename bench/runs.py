"""Measure whole processes: peak memory, a run beside the authors' loop, busy neighbours, start-up."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, TensorDataset

from bench.compare import Build, Settings, alone, prepare, table
from bench.steps import attach_qsparse, ours, read_config
from qprune import Schedule, compress
from qprune.tasks.espcn import Espcn
from qprune.tasks.metrics.psnr import psnr_db
from qprune.training.task import DataOptions, Limits

QPRUNE = [sys.executable, "-m", "qprune.cli.main"]
EPOCHS = 200  # those of the paper
PROCESSES = 3  # whose median a peak of memory is: which gaps a heap has is a matter of luck


def memory(settings: Settings) -> str:
    """Compare the peak memory of MobileNetV2's training with that of the float network."""
    variants: dict[str, Build] = {
        "float": partial(ours, "cifar", "float"),
        "P+Q": partial(ours, "cifar"),
        "P+Q, without a C compiler": partial(ours, "cifar", "active", "no compiler"),
    }
    rows, floats = [], 0.0
    for name, build in variants.items():
        peak = statistics.median(alone(_peak_mb, build, settings) for _ in range(PROCESSES))
        floats = floats or peak
        rows.append([name, f"{peak:,.0f}", f"{peak / floats:.3f}"])
    text = f"Resident memory at its highest, above that of the imports; medians of {PROCESSES} processes.\n\n"
    return text + table(["step", "MB", "ratio"], rows)


def _peak_mb(build: Build, settings: Settings) -> float:
    prepare(settings.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = build()
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def whole_run(settings: Settings, epochs: int = EPOCHS // 10) -> str:
    """Compare a whole `qprune run` of ESPCN with a plain loop in the authors' manner, one after the other."""
    data = "real" if Path(os.environ.get("QPRUNE_DATA", "none"), "t91").is_dir() else "synthetic"
    seconds = {"authors' loop": alone(_authors_loop, settings.threads, epochs, data)}
    for name, compiled in (("`qprune run`", "false"), ("`qprune run`, compiled", "true")):
        with tempfile.TemporaryDirectory() as folder:
            keys = [f"trainer.threads={settings.threads}", f"trainer.compile={compiled}", f"data={data}"]
            keys += [f"budget.epochs={epochs}", f"results_dir={folder}"]
            seconds[name] = _seconds([*QPRUNE, "run", "task=espcn", "order=prune_first", *keys])
    plain = seconds["authors' loop"]
    rows = [[name, f"{taken / 60:.2f}", f"{taken / plain:.3f}"] for name, taken in seconds.items()]
    return (
        f"{epochs} epochs on {data} data, evaluated after each. Authors' loop: DataLoader, eager, default allocator, "
        "qsparse 2.0.1, no checkpoints, test images in squares, since qsparse refuses other sizes. `qprune run`: the "
        f"whole command, with the compiler's cache as it was.\n\n{table(['loop', 'minutes', 'ratio'], rows)}"
    )


def _authors_loop(threads: int, epochs: int, data: str) -> float:
    torch.set_num_threads(threads)
    task = Espcn(data=DataOptions(data, os.environ.get("QPRUNE_DATA")), limits=Limits(epochs), seed=0)
    network = task.network.to(memory_format=torch.contiguous_format)
    batches = task.train_batches
    side, batch = batches.inputs.shape[-1], batches.batch_size
    loader = DataLoader(TensorDataset(batches.inputs, batches.targets), batch_size=batch, shuffle=True)
    test = DataLoader(TensorDataset(*task.test_images.patches(side, side)), batch_size=batch)
    timeline = Schedule(**read_config("schedule/espcn/prune_first")).scaled(epochs / EPOCHS).in_steps(len(loader))
    # One pruning step where the recipe has its last: the events themselves are not compared.
    at = timeline.prune_steps[-1], timeline.weight_step or 0, timeline.feature_step or 0
    attach_qsparse(network, "espcn", *at)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    start = time.perf_counter()
    for _ in range(epochs):
        network.train()
        total = 0.0
        for low, high in loader:
            optimizer.zero_grad()
            loss = F.mse_loss(network(low), high)
            loss.backward()
            optimizer.step()
            total += loss.item()
        network.eval()
        with torch.no_grad():
            torch.stack([psnr_db(network(low), high) for low, high in test]).mean().item()
    return time.perf_counter() - start


def beside(settings: Settings) -> str:
    """Measure a float step of MobileNetV2 alone and beside one and two busy processes."""
    rows: list[list[str]] = []
    for variable in ("nothing", "GOMP_SPINCOUNT=10000"):
        with patch.dict(os.environ):
            os.environ.pop("GOMP_SPINCOUNT", None)
            os.environ.pop("OMP_WAIT_POLICY", None)
            name, _, value = variable.partition("=")
            os.environ.update({name: value} if value else {})
            none, one, two = (_beside_busy(busy, settings) for busy in range(3))
        ms = [f"{1e3 * seconds:,.0f}" for seconds in (none, one, two)]
        rows.append([variable, *ms, f"{one / none:.2f}", f"{two / none:.2f}"])
    head = ["set", "alone, ms", "beside one, ms", "beside two, ms", "ratio, one", "ratio, two"]
    return f"A step of {settings.threads} threads, the mean of {settings.steps} steps.\n\n{table(head, rows)}"


def _beside_busy(busy: int, settings: Settings) -> float:
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        return alone(_step_seconds, settings)  # type: ignore[no-any-return]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def _step_seconds(settings: Settings) -> float:
    prepare(settings.threads)
    timer = Timer("step()", globals={"step": ours("cifar", "float")}, num_threads=settings.threads)
    return timer.timeit(settings.steps).mean


def attaching(settings: Settings) -> str:
    """Measure how long `compress` takes, in forward passes of its example."""
    rows = []
    for name in ("resnet18", "mobilenet_v2"):
        forward, compressing = alone(_attaching, name, settings)
        rows.append([name, f"{1e3 * forward:,.0f}", f"{1e3 * compressing:,.0f}", f"{compressing / forward:.1f}"])
    return f"16 pictures of 128 x 128.\n\n{table(['network', 'forward pass, ms', 'compress, ms', 'ratio'], rows)}"


def _attaching(name: str, settings: Settings) -> tuple[float, float]:
    prepare(settings.threads)
    network, pictures = getattr(torchvision.models, name)(), torch.randn(16, 3, 128, 128)
    with torch.no_grad():
        forward = Timer("network(x)", globals={"network": network, "x": pictures}, num_threads=settings.threads)
        seconds = forward.timeit(settings.rounds).mean
    start = time.perf_counter()
    compress(network, pictures, Schedule(t_qw=1, t_qf=1), steps_per_epoch=1, batch_size=16)
    return seconds, time.perf_counter() - start


def startup(settings: Settings) -> str:
    """Measure how long short commands take."""
    rows = []
    for words in (["--help"], ["list", "tasks"], ["list", "orders"]):
        seconds = statistics.median(_seconds([*QPRUNE, *words]) for _ in range(settings.rounds))
        rows.append([f"`qprune {' '.join(words)}`", f"{seconds:.2f}"])
    return table(["command", "seconds"], rows)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start
