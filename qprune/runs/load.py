"""A finished run taken up again: its task, its trained network and the inputs that the network sees."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qprune.compression.compressor import Compressor
from qprune.config.build import Recipe
from qprune.config.schema import RunConfig
from qprune.errors import UserError
from qprune.runs.checksums import check_sum
from qprune.runs.decimals import NETWORK_FILE
from qprune.runs.row import ROW_FILE, Row, load_row
from qprune.runs.store import CONFIG_FILE, read_config
from qprune.training.setup import attach_operators, build_task
from qprune.training.task import Task

SHORTEST_SIGNATURE = 6  # digits


@dataclass
class FinishedRun:
    """What `qprune run` left in `folder`, `task.network` trained, operators in their final state."""

    folder: Path
    row: Row
    config: RunConfig
    task: Task
    compressor: Compressor

    @classmethod
    def load(cls, run: str, results_dir: Path, changes: Mapping[str, Any] | None = None) -> FinishedRun:
        """Take up `run`, a folder or the first digits of a signature. changes: machine keys of the config by dotted
        name (`data.root`), or `budget.test_samples`. Raises UserError for an unfinished run or one that cannot be read.
        """
        folder = run_of(run, results_dir)
        row = load_row(folder / ROW_FILE)
        config = read_config(folder)
        if config is None:
            raise UserError(
                f"{folder / CONFIG_FILE} is missing or cannot be read; run the run's command with force=true"
            )
        for name in (CONFIG_FILE, NETWORK_FILE):
            check_sum(folder / name)
        for key, value in (changes or {}).items():
            section, _, name = key.partition(".")
            config[section][name] = value
        recipe = Recipe.from_config(config)
        task = build_task(recipe)
        compressor = attach_operators(recipe, task)
        path = folder / NETWORK_FILE
        try:
            task.network.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{path} is not the network of this run ({str(error).splitlines()[0]})") from error
        compressor.at(recipe.limits.epochs * len(task.train_batches))
        return cls(folder, row, recipe.config, task, compressor)

    @property
    def network_digest(self) -> str:
        """The SHA-256 of the file of the trained network."""
        return hashlib.sha256((self.folder / NETWORK_FILE).read_bytes()).hexdigest()

    @property
    def example(self) -> Tensor:
        """The one tensor that the network takes. Raises UserError where it takes something else."""
        example = self.task.example
        if isinstance(example, Tensor):
            return example
        if isinstance(example, tuple) and len(example) != 1:
            given = f"{len(example)} arguments"
        else:
            given = "something other than one tensor"
        raise UserError(
            f"the network of the task {self.row.task} takes {given}, and an ONNX file of qprune is a network from one "
            "tensor to one; qprune export --to sparse writes its weights and masks"
        )

    def training_input(self) -> Tensor:
        """The first training batch as the network gets it; nothing is trained."""
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].detach().clone())
            raise _SeenError

        handle = self.task.network.register_forward_pre_hook(stop, prepend=True)
        self.task.optimizers()
        self.task.begin_epoch(0)
        try:
            with suppress(_SeenError):
                self.task.train_step(next(iter(self.task.train_batches.epoch(0))))
        finally:
            handle.remove()
        return seen[0]

    def evaluate_as(self, network: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The task's evaluation with another network, or any function, in the place of its own."""
        with self._standing_in(network):
            return self.task.evaluate()

    @contextmanager
    def _standing_in(self, network: Callable[[Tensor], Tensor]) -> Iterator[None]:
        own = self.task.network
        self.task.network = _Stand(network)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                yield
        finally:
            self.task.network = own


class _Stand(nn.Module):
    """A function where a task has its network; the modes that a task sets do not reach it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = (function,)

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x)


class _SeenError(Exception):
    """Stops a training step when its input has been seen."""


def run_of(run: str, results_dir: Path) -> Path:
    """The folder of a finished run, from a path or the first digits of a signature. Raises UserError."""
    folder = Path(run)
    if folder.is_dir():
        if not (folder / ROW_FILE).exists():
            what = f"is not finished (it has no {ROW_FILE})" if (folder / CONFIG_FILE).exists() else "is no run folder"
            raise UserError(f"{folder} {what}; finish the run with the command that began it, or name another")
        return folder
    if not re.fullmatch(f"[0-9a-f]{{{SHORTEST_SIGNATURE},64}}", run):
        raise UserError(
            f"{run!r} is neither a folder nor the beginning of a signature ({SHORTEST_SIGNATURE} digits or more); "
            f"give a run folder, or what its name ends with"
        )
    found = sorted(path.parent for path in results_dir.glob(f"*/*-{run[:10]}*/{ROW_FILE}"))
    found = [path for path in found if load_row(path / ROW_FILE).signature.startswith(run)]
    if not found:
        begun = sorted(results_dir.glob(f"*/*-{run[:10]}*/{CONFIG_FILE}"))
        unfinished = f"; the run in {begun[0].parent} is not finished" if begun else ""
        raise UserError(f"no finished run below {results_dir} has a signature that begins with {run}{unfinished}")
    if len(found) > 1:
        raise UserError(f"{len(found)} runs have a signature that begins with {run}: give more digits")
    return found[0]
