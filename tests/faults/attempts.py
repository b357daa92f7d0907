"""One attempt at a run, in a process forked from one that has imported torch, which dies where it is told to.

Imported by the fork server before it forks; importing it computes nothing with more than one thread.
"""

import functools
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from qprune.atomic_write import write_json
from qprune.cli import failures
from qprune.runs import execute as run
from qprune.tasks import cifar, cyclegan, espcn
from qprune.tasks.data.batches import TensorBatches

torch.set_num_threads(1)
os.environ["QPRUNE_TRUST"] = "tests"
# Made in memory from a fixed seed: made once, for all processes that are forked from this one.
cifar.classified_gratings = functools.cache(cifar.classified_gratings)
espcn.textured_pictures = functools.cache(espcn.textured_pictures)
cyclegan.plain_or_striped = functools.cache(cyclegan.plain_or_striped)

WRITTEN = {"result.json", "network.safetensors", "SHA256SUMS", "metrics.csv", "config.yaml", "operators.json"}


class Death(NamedTuple):
    """Where a process kills itself with SIGKILL: at the `count`-th time (from 1) that it comes to the place `name`."""

    name: str
    count: int


class Places:
    """Counts how often a process comes to each place, and kills it at the one it was given."""

    def __init__(self, death: Death | None) -> None:
        self.death, self.counts = death, Counter[str]()

    def reach(self, name: str, before: Callable[[], Any] = lambda: None) -> None:
        """Come to a place; `before` is what is done in the moment of death."""
        self.counts[name] += 1
        if self.death == (name, self.counts[name]):
            before()
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # the signal is on its way

    def watch(self) -> None:
        """Put this object's places into torch, the operating system's functions, and the tasks; for good."""
        torch.nn.modules.module.register_module_forward_hook(lambda *_: self.reach("layer"))
        register_optimizer_step_pre_hook(lambda *_: self.reach("before an optimizer"))
        register_optimizer_step_post_hook(lambda *_: self.reach("after an optimizer"))
        backward, fsync, replace = torch.Tensor.backward, os.fsync, Path.replace
        unlink, rmtree = Path.unlink, shutil.rmtree

        def reaching_backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            self.reach("backward pass")
            backward(tensor, *args, **kwargs)

        def reaching_fsync(handle: int) -> None:
            self.reach("half a file", lambda: os.ftruncate(handle, os.fstat(handle).st_size // 2))
            self.reach("a whole file")
            fsync(handle)

        def reaching_replace(path: Path, target: Any) -> Path:
            name = Path(target).name
            kind = name if name in WRITTEN else "another file"
            if name.endswith(".pt"):
                kind = "a warm start" if "warm_starts" in Path(target).parts else "a checkpoint"
            self.reach(f"before {kind} is in place")
            done = replace(path, target)
            self.reach(f"after {kind} is in place")
            return done

        def reaching_unlink(path: Path, missing_ok: bool = False) -> None:
            self.reach("before a removal")
            unlink(path, missing_ok)

        def reaching_rmtree(*args: Any, **kwargs: Any) -> None:
            self.reach("before checkpoints are removed")
            rmtree(*args, **kwargs)

        torch.Tensor.backward, os.fsync, Path.replace = reaching_backward, reaching_fsync, reaching_replace
        Path.unlink, shutil.rmtree = reaching_unlink, reaching_rmtree
        for task in (cifar.Cifar, espcn.Espcn, cyclegan.CycleGAN):
            task.evaluate = self._around(task.evaluate)

    def _around(self, evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def reaching(task: Any) -> Any:
            self.reach("before an evaluation")
            metrics = evaluate(task)
            self.reach("after an evaluation")
            return metrics

        return reaching


def permute_samples(order: int) -> None:
    """Have batches come with their samples in another order: the same sums of floats, added differently."""
    epoch = TensorBatches.epoch

    def permuted(batches: TensorBatches, *args: Any, **kwargs: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for inputs, targets in epoch(batches, *args, **kwargs):
            new = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(order))
            yield inputs[new], targets[new]

    TensorBatches.epoch = permuted


def attempt(config: dict[str, Any], death: Death | None, notes: str, order: int = 0) -> None:
    """Carry out a run with its output in files below `notes`; exit as the command line would.

    order: other than 0, the samples within batches come in another order.
    """
    folder = Path(notes)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = (folder / "output.txt").open("a", buffering=1)
    places = Places(death)
    places.watch()
    if order:
        permute_samples(order)
    started = time.monotonic()
    try:
        run.execute(OmegaConf.create(config))
    except Exception as error:
        sys.exit(failures.report(error)[0])
    write_json(folder / "places.json", {"counts": dict(places.counts), "seconds": time.monotonic() - started})


# what is shared by forking: the functions above have made nothing yet
cifar.classified_gratings()
espcn.textured_pictures(32, part="train"), espcn.textured_pictures(5, part="test")
