"""Section `loops`: a whole run of ESPCN, our loop against the plain loop in the authors' manner, on the same epochs."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

from bench.contenders import CPU, LAYOUTS, qsparse_on, task_of
from bench.report import table
from bench.rounds import make_ready

EPOCHS = 200  # those of the paper
EPOCHS_OF_A_TURN = 10  # five seconds: what a change of loops disturbs is then no part of what is measured


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
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        short = _taking_turns({"ours, compiled": _compiled}, replace(setting, epochs=EPOCHS // 20))
        measured = _taking_turns({"ours": _ours, "ours, compiled": _compiled, "authors": _authors}, setting)
    first = short["ours, compiled"][1]
    plain, _, _, steps = measured["authors"]
    rows = [
        [
            name,
            f"{whole / 60:.2f}",
            f"{whole / plain:.3f}",
            f"{compiling:.1f}",
            f"{other:.1f}",
            f"{(whole - compiling - other) / plain:.3f}",
        ]
        for name, (whole, compiling, other, _) in measured.items()
    ]
    head = ["loop", "minutes", "against authors'", "of it compiling, s", "evaluating and saving, s", "the rest alone"]
    return (
        f"{'T91' if real else 'Synthetic patches'}: {EPOCHS} epochs of {steps} steps, once each, in processes that "
        f"take turns of {EPOCHS_OF_A_TURN} epochs. Both evaluate after each epoch. Ours: `qprune run`'s trainer, with "
        f"checkpoints; authors': DataLoader, eager, default allocator, qsparse 2.0.1 on the same network, no "
        f"checkpoints, and test images in squares of a training patch's size, since qsparse refuses others. The "
        f"compiler's cache was filled before; with an empty one the same graphs took {first:.1f} s.\n\n"
        + table(head, rows)
    )


Measured = tuple[float, float, float, int]  # seconds in all, of compiling, of evaluating and saving; steps an epoch


class Turn:
    """Lets one loop at a time go on, and does not count its waits."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.waited, self.epochs = pipe, 0.0, 0

    def end_epoch(self) -> None:
        """Say that an epoch is done; at the end of a turn, wait for the next."""
        self.epochs += 1
        if self.epochs % EPOCHS_OF_A_TURN:
            return
        start = time.perf_counter()
        self.pipe.send(None)
        self.pipe.recv()
        self.waited += time.perf_counter() - start


def _taking_turns(functions: dict[str, Callable[[Turn, Setting], Measured]], setting: Setting) -> dict[str, Measured]:
    """What each function measured; a machine's ups and downs meet all of them."""
    pipes: dict[str, Connection] = {}
    processes = []
    measured: dict[str, Measured] = {}
    try:
        for name, function in functions.items():
            pipes[name], there = get_context("spawn").Pipe()
            process = get_context("spawn").Process(target=_serve, args=(there, function, setting), daemon=True)
            process.start()
            processes.append(process)
            there.close()
        while len(measured) < len(functions):
            for name, pipe in pipes.items():
                if name not in measured:
                    pipe.send(None)
                    try:
                        done = pipe.recv()
                    except EOFError:
                        raise RuntimeError(f"the loop {name!r} ended with the error above") from None
                    if done is not None:
                        measured[name] = done
    finally:
        for process in processes:  # a trainer takes a polite end for a wish to stop after its step
            process.kill()
    return measured


def _serve(pipe: Connection, function: Callable[[Turn, Setting], Measured], setting: Setting) -> None:
    pipe.recv()
    pipe.send(function(Turn(pipe), setting))


def _ours(turn: Turn, setting: Setting, compiled: bool = False) -> Measured:
    from qprune.experiment.layout import arrange
    from qprune.experiment.trainer import Loop, Trainer

    make_ready(setting.threads)
    recipe, task = task_of("espcn", *setting.overrides)
    arrange(task, None, compiled, CPU)
    compressor = recipe.attached(task)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(
            epochs=setting.epochs,
            folder=Path(folder),
            seed=0,
            compile=compiled,
            fuse_relu=True,
            checkpoint_seconds_apart=Loop.checkpoint_seconds_apart * 3,  # by the clock, which runs for all three
            watch=lambda _: turn.end_epoch(),
        )
        trainer = Trainer(task, compressor, loop, CPU)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
            start = time.perf_counter()
            trainer.fit()
        whole, compiling = time.perf_counter() - start - turn.waited, trainer.ways.compile_seconds
        return whole, compiling, whole - compiling - trainer.state.seconds, trainer.steps_per_epoch


def _compiled(turn: Turn, setting: Setting) -> Measured:
    return _ours(turn, setting, compiled=True)


def _authors(turn: Turn, setting: Setting) -> Measured:
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader, TensorDataset

    from qprune.experiment.layout import arrange
    from qprune.tasks.espcn import Espcn
    from qprune.tasks.metrics.psnr import psnr_db

    torch.set_num_threads(setting.threads)
    recipe, task = task_of("espcn", *setting.overrides)
    assert isinstance(task, Espcn)
    arrange(task, LAYOUTS["contiguous"], compiled=False, device=CPU)  # qsparse refuses channels last
    times = recipe.timeline(task)
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
        turn.end_epoch()
    return time.perf_counter() - start - turn.waited, 0.0, evaluating, len(loader)
