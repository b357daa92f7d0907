"""Section `loops`: a whole run of ESPCN, our loop against the plain loop in the authors' manner, on the same epochs."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

from bench.contenders import CPU, qsparse_on, task_of, with_operators
from bench.report import table

EPOCHS = 200  # those of the paper


def loops(threads: int, rounds: int) -> str:
    """The recipe `prune_first` on T91, or on synthetic patches where QPRUNE_DATA names none, in full."""
    real = Path(os.environ.get("QPRUNE_DATA", "none"), "t91").is_dir()
    measured: dict[str, tuple[float, float, float]] = {}
    steps = 0
    for name, function in (("ours", _ours), ("ours, compiled", _compiled), ("authors", _authors)):
        with get_context("spawn").Pool(1) as pool:
            whole, compiling, other, steps = pool.apply(function, (threads, real))
        measured[name] = whole, compiling, other
    plain = measured["authors"][0]
    rows = [
        [
            name,
            f"{whole / 60:.2f}",
            f"{whole / plain:.3f}",
            f"{compiling:.1f}",
            f"{other:.1f}",
            f"{(whole - compiling - other) / plain:.3f}",
        ]
        for name, (whole, compiling, other) in measured.items()
    ]
    head = ["loop", "minutes", "against authors'", "of it compiling, s", "evaluating and saving, s", "the rest alone"]
    return (
        f"{'T91' if real else 'Synthetic patches'}: {EPOCHS} epochs of {steps} steps, once each. Ours: `qprune run`'s "
        f"trainer with an evaluation after each epoch and checkpoints; authors': DataLoader, eager, default allocator, "
        f"qsparse 2.0.1 on the same network, and no evaluation, since qsparse refuses pictures of another size than it "
        f"was trained on.\n\n" + table(head, rows)
    )


def _overrides(real: bool) -> list[str]:
    return [f"budget.epochs={EPOCHS}", *(["data=real"] if real else [])]


def _ours(threads: int, real: bool, compiled: bool = False) -> tuple[float, float, float, int]:
    import torch

    from qprune.compression import kernels
    from qprune.experiment.layout import arrange
    from qprune.experiment.memory import keep_freed_memory
    from qprune.experiment.trainer import Loop, Trainer

    torch.set_num_threads(threads)
    keep_freed_memory()
    kernels.load()
    recipe, task = task_of("espcn", *_overrides(real))
    arrange(task, None, compiled, CPU)
    compressor = with_operators(recipe, task, recipe.timeline(task))
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(epochs=EPOCHS, folder=Path(folder), seed=0, compile=compiled, fuse_relu=True)
        trainer = Trainer(task, compressor, loop, CPU)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
            start = time.perf_counter()
            trainer.fit()
        whole, compiling = time.perf_counter() - start, trainer.ways.compile_seconds
        return whole, compiling, whole - compiling - trainer.state.seconds, trainer.steps_per_epoch


def _compiled(threads: int, real: bool) -> tuple[float, float, float, int]:
    return _ours(threads, real, compiled=True)


def _authors(threads: int, real: bool) -> tuple[float, float, float, int]:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(threads)
    recipe, task = task_of("espcn", *_overrides(real))
    times = recipe.timeline(task)
    assert times.weight_step is not None
    assert times.feature_step is not None
    # One pruning step where the recipe has its last: the events themselves are not what is compared.
    qsparse_on(task, "espcn", times.prune_steps[-1], times.feature_step, times.weight_step)
    data = TensorDataset(task.train_batches.inputs, task.train_batches.targets)  # type: ignore[attr-defined]
    loader = DataLoader(data, batch_size=task.train_batches.batch_size, shuffle=True)
    network = task.network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    start = time.perf_counter()
    for _ in range(EPOCHS):
        network.train()
        total = 0.0
        for low, high in loader:
            optimizer.zero_grad()
            loss = F.mse_loss(network(low), high)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return time.perf_counter() - start, 0.0, 0.0, len(loader)
