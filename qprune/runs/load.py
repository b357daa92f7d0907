"""A finished run reloaded: its task, trained network and the network's inputs."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from qprune.compression.compressor import Compressor
from qprune.compression.prepare import find_operators
from qprune.compression.quantizer import Quantizer
from qprune.config.build import Recipe
from qprune.config.schema import RunConfig
from qprune.errors import TRUST_VARIABLE, UserError
from qprune.runs.folder import CONFIG_FILE, NETWORK_FILE, RunFolder
from qprune.runs.histograms import Enough
from qprune.runs.row import Row
from qprune.training.distributed import choose_device
from qprune.training.setup import attach_operators, build_task
from qprune.training.task import Task
from qprune.training.trainer import evaluation_context


@dataclass
class FinishedRun:
    """A finished run: its trained network, operators in their final state."""

    folder: Path
    row: Row
    config: RunConfig
    task: Task
    compressor: Compressor

    @classmethod
    def load(cls, run: str, results_dir: Path, changes: Mapping[str, Any] | None = None) -> Self:
        """Reload a run, found by folder or signature, on the CPU. Raises UserError.

        The folder is data, whoever made it: its config names a task that is qprune's or trusted, and no place to write.

        `changes` are keys of the config by dotted name: machine keys (`data.root`), or such as say what the network is
        tested on (`budget.test_samples`, `task.test_folder`).
        """
        folder = RunFolder.find(run, results_dir)
        row, stored = folder.row(), folder.config()
        if stored is None:
            raise UserError(f"{folder.path / CONFIG_FILE} is missing; run the run's command with force=true")
        for key, value in (changes or {}).items():
            section, _, name = key.partition(".")
            stored[section][name] = value
        recipe = Recipe.from_config(stored)
        _require_trusted(recipe.config.task.class_path)
        task = build_task(replace(recipe, fetch="data.root" in (changes or {})))
        compressor = attach_operators(recipe, task)
        try:
            task.network.load_state_dict(_trained_tensors(folder))
        except RuntimeError as error:
            path = folder.path / NETWORK_FILE
            raise UserError(f"{path} is not the network of this run ({str(error).splitlines()[0]})") from error
        compressor.at(recipe.limits.epochs * len(task.train_batches))
        return cls(folder.path, row, recipe.config, task, compressor)

    @property
    def network_digest(self) -> str:
        """The SHA-256 of the file of the trained network."""
        return hashlib.sha256((self.folder / NETWORK_FILE).read_bytes()).hexdigest()

    @property
    def example(self) -> Tensor:
        """The one tensor that the network takes; UserError where it takes something else."""
        example = self.task.example
        if isinstance(example, Tensor):
            return example
        several = isinstance(example, tuple) and len(example) != 1
        given = f"{len(example)} arguments" if several else "something other than one tensor"
        raise UserError(
            f"the network of the task {self.row.task} takes {given}, and an ONNX file of qprune is a network from one "
            "tensor to one; qprune export --form sparse writes its weights and masks"
        )

    def training_input(self) -> Tensor:
        """Return the first training batch as the network gets it; nothing is trained."""
        inputs: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.append(args[0].detach().clone())
            raise Enough

        handle = self.task.network.register_forward_pre_hook(stop, prepend=True)
        self.task.optimizers()
        self.task.begin_epoch(0)
        try:
            with suppress(Enough):
                self.task.train_step(next(iter(self.task.train_batches.epoch(0))))
        finally:
            handle.remove()
        return inputs[0]

    @property
    def device(self) -> torch.device:
        """The device that the run's config chooses on this machine."""
        return choose_device(self.config.trainer.device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the task on the run's device, and compute as the run's own evaluations did."""
        self.task.to(self.device)
        precision = self.config.trainer.precision
        with evaluation_context(self.compressor, self.device, self.config.seed, precision), torch.no_grad():
            yield

    def evaluate(self) -> dict[str, float]:
        """Return all metrics of the trained network."""
        with self.evaluating():
            return self.task.evaluate()

    def evaluate_as(self, network: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the task's evaluation with any function in the place of its network."""
        own = self.task.network
        self.task.network = _FunctionAsNetwork(network)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.config.seed)
                return self.task.evaluate()
        finally:
            self.task.network = own


def _require_trusted(target: str) -> None:
    """Raise UserError unless a stored run's task is qprune's, or of a package that the user trusts."""
    trusted = ("qprune.tasks", *filter(None, os.environ.get(TRUST_VARIABLE, "").replace(" ", "").split(",")))
    if not any(target.startswith(f"{package}.") for package in trusted):
        package = target.partition(".")[0]
        raise UserError(
            f"task._target_={target} is code outside qprune, and this command would import it for a stored run; if you "
            f"trust the package {package}, add --trust {package} to the command, or for good: export "
            f"{TRUST_VARIABLE}={package}"
        )


class _FunctionAsNetwork(nn.Module):
    """A function in the place of a network; modes that a task sets do not reach it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = (function,)  # in a tuple: a module would become a child

    def forward(self, x: Tensor) -> Tensor:
        return self.function[0](x)


def copy_fraction_bits(network: nn.Module, run: RunFolder) -> None:
    """Fix all fraction bits at those of a finished run: Q_u(x, d*) of Table 1.

    Raises UserError for a quantizer that the run lacks, or has with another number of fraction bits.
    """
    tensors = _trained_tensors(run)
    theirs = {_site(name): value for name, value in tensors.items() if name.endswith(".decimal")}
    names = {id(buffer): name for name, buffer in network.named_buffers() if name.endswith("decimal")}
    for placed in find_operators(network):
        if not isinstance(quantizer := placed.operator, Quantizer):
            continue
        site = _site(names[id(quantizer.decimal)])
        if site not in theirs or theirs[site].shape != quantizer.decimal.shape:
            raise UserError(
                f"quantize.decimal_from: the run in {run.path} has no fraction bits that fit {placed.kind} "
                f"{placed.path}; give a run of the same task with the same quantize.targets and quantize.weight_axis"
            )
        with torch.no_grad():
            quantizer.decimal.copy_(theirs[site])
        quantizer.searches = False


def _trained_tensors(run: RunFolder) -> dict[str, Tensor]:
    path = run.path / NETWORK_FILE
    if (content := run.checked_content(NETWORK_FILE)) is None:
        raise UserError(f"{path} is missing; run the run's command with force=true")
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that this torch does not have
        raise UserError(f"{path} cannot be read ({error})") from error


def _site(buffer: str) -> str:
    """Return a `decimal`'s name without its index: a pruner may precede it."""
    return re.sub(r"(\.parametrizations\.weight)\.\d+", r"\1", buffer)
