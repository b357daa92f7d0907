"""Section `loops`: a whole run of ESPCN, our loop against the plain loop in the authors' manner, on the same epochs."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

from bench.contenders import CPU, LAYOUTS, qsparse_on, task_of
from bench.report import table
from bench.rounds import make_ready

EPOCHS = 200  # those of the paper


@dataclass(frozen=True)
class Setting:
    """What all loops have alike: CPU threads, whether T91 is there, and how long they train."""

    threads: int
    real: bool
    epochs: int = EPOCHS

    @property
    def overrides(self) -> list[str]:
        """The keys of a run with this setting."""
        return [f"budget.epochs={self.epochs}", *(["data=real"] if self.real else [])]


def loops(threads: int, rounds: int) -> str:
    """The recipe `prune_first` on T91, or on synthetic patches where QPRUNE_DATA names none, in full."""
    real = Path(os.environ.get("QPRUNE_DATA", "none"), "t91").is_dir()
    setting = Setting(threads, real)
    functions = {"ours": _ours, "ours, compiled": _compiled, "authors": _authors}
    measured: dict[str, list[Measured]] = {name: [] for name in functions}
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        first = _alone(_compiled, replace(setting, epochs=EPOCHS // 20))[1]
        for name in (*functions, *reversed(functions)):  # there and back: a machine that slows down slows all alike
            measured[name].append(_alone(functions[name], setting))
    steps = measured["authors"][0][3]
    plain = sum(whole for whole, *_ in measured["authors"])
    rows = []
    for name, runs in measured.items():
        whole, compiling, other = (sum(run[part] for run in runs) for part in range(3))
        rows.append(
            [
                name,
                " and ".join(f"{run[0] / 60:.2f}" for run in runs),
                f"{whole / plain:.3f}",
                f"{compiling / len(runs):.1f}",
                f"{other / len(runs):.1f}",
                f"{(whole - compiling - other) / plain:.3f}",
            ]
        )
    head = ["loop", "minutes", "against authors'", "of it compiling, s", "evaluating and saving, s", "the rest alone"]
    return (
        f"{'T91' if real else 'Synthetic patches'}: {EPOCHS} epochs of {steps} steps, each loop whole and by itself, "
        f"twice: down this table and up again; ratios are of both runs together. Both evaluate after each epoch. Ours: "
        f"`qprune run`'s trainer, with checkpoints; authors': DataLoader, eager, default allocator, qsparse 2.0.1 on "
        f"the same network, no checkpoints, and test images in squares of a training patch's size, since qsparse "
        f"refuses others. The compiler's cache was filled before; with an empty one the same graphs took "
        f"{first:.1f} s.\n\n" + table(head, rows)
    )


Measured = tuple[float, float, float, int]  # seconds in all, of compiling, of evaluating and saving; steps an epoch


def _alone(function: Callable[[Setting], Measured], setting: Setting) -> Measured:
    """What a loop measures in a process of its own, with nothing beside it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, setting).result()


def _ours(setting: Setting, compiled: bool = False) -> Measured:
    from qprune.training.layout import arrange
    from qprune.training.setup import attach_operators
    from qprune.training.trainer import Loop, Trainer

    make_ready(setting.threads)
    recipe, task = task_of("espcn", *setting.overrides)
    arrange(task, None, compiled, CPU)
    compressor = attach_operators(recipe, task)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(setting.epochs, Path(folder), seed=0, compile=compiled)
        trainer = Trainer(task, compressor, loop, CPU)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
            start = time.perf_counter()
            trainer.fit()
        whole, compiling = time.perf_counter() - start, trainer.ways.compile_seconds
        return whole, compiling, whole - compiling - trainer.state.seconds, trainer.steps_per_epoch


def _compiled(setting: Setting) -> Measured:
    return _ours(setting, compiled=True)


def _authors(setting: Setting) -> Measured:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset

    from qprune.tasks.espcn import Espcn
    from qprune.tasks.metrics.psnr import psnr_db
    from qprune.training.layout import arrange
    from qprune.training.setup import timeline_of

    torch.set_num_threads(setting.threads)
    recipe, task = task_of("espcn", *setting.overrides)
    assert isinstance(task, Espcn)
    arrange(task, LAYOUTS["contiguous"], compiled=False, device=CPU)  # qsparse refuses channels last
    times = timeline_of(recipe, task)
    assert times.weight_step is not None
    assert times.feature_step is not None
    # One pruning step where the recipe has its last: the events themselves are not what is compared.
    qsparse_on(task, "espcn", times.prune_steps[-1], times.feature_step, times.weight_step)
    side, batch = task.train_batches.inputs.shape[-1], task.train_batches.batch_size
    data = TensorDataset(task.train_batches.inputs, task.train_batches.targets)
    loader = DataLoader(data, batch_size=batch, shuffle=True)
    test = DataLoader(TensorDataset(*task.test_images.patches(side, side)), batch_size=batch)
    network = task.network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    evaluating, start = 0.0, time.perf_counter()
    for _ in range(setting.epochs):
        network.train()
        total = 0.0
        for low, high in loader:
            optimizer.zero_grad()
            loss = F.mse_loss(network(low), high)
            loss.backward()
            optimizer.step()
            total += loss.item()
        trained = time.perf_counter()
        network.eval()
        with torch.no_grad():
            torch.stack([psnr_db(network(low), high) for low, high in test]).mean().item()
        evaluating += time.perf_counter() - trained
    return time.perf_counter() - start, 0.0, evaluating, len(loader)
