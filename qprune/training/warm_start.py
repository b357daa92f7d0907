"""Warm start (`trainer.warm_start`): runs of a sweep share a float prefix.

Operators do nothing before the first event or its window (in the paper's recipes, 40 to 80 % of training). The shared
prefix is the state at the last end of an epoch before that, kept without operators below `results_dir/warm_starts`.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from filelock import FileLock, Timeout

import qprune
from qprune.atomic_write import explained, remove_left_temporaries
from qprune.compression.operator import Operator
from qprune.compression.schedule import Timeline
from qprune.config import signature as identity
from qprune.config.schema import RunConfig
from qprune.training import checkpoint
from qprune.training.progress import print_text
from qprune.training.task import Task

FOLDER = "warm_starts"
LOCK = ".lock"  # held by the one process that writes in a folder; readers need none
# Keys that say only what operators do, where, when, and how they are counted.
_OPERATOR_KEYS = frozenset(("order", "prune", "quantize", "schedule", "task.sites", "task.paper_size"))
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original$")


def steps_to_leave(events: Iterable[float], timeline: Timeline) -> set[int]:
    """Return the ends of epochs before `events` and their windows, in steps. events: in trained epochs."""
    epoch = timeline.steps_per_epoch
    steps = [int(event * epoch + 1e-6) for event in events]
    alone = [replace(timeline, prune_steps=(), weight_step=None, feature_step=step) for step in steps]
    return {(each.first_action or 0) // epoch * epoch for each in alone} - {0}


class WarmStart:
    """Float prefixes, in the `folder` of runs that agree in all that these depend on.

    `reading` is False for a run that is to be trained in full (`force=true`).
    """

    def __init__(self, folder: Path, task: Task, reading: bool = True) -> None:
        self.folder, self.task, self.reading = folder, task, reading

    @classmethod
    def of(cls, config: RunConfig, task: Task, device: torch.device) -> Self:
        """Return that of a run; this machine's arithmetic is part of what must agree."""
        kept = identity.without(identity.identity(config), _OPERATOR_KEYS)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        machine = {"torch": torch.__version__, "device": name, "threads": torch.get_num_threads()}
        agreed = {"run": kept, "machine": machine, "data": task.dataset, "qprune": qprune.__version__}
        key = identity.short_hash([json.dumps(agreed, sort_keys=True)])
        folder = Path(config.results_dir, FOLDER, f"{config.task.name}-seed{config.seed}-{key}")
        if folder.is_dir():  # a killed writer may have left something
            with suppress(Timeout, OSError), FileLock(folder / LOCK, timeout=0):  # in use, or not ours to change
                remove_left_temporaries(folder)
        return cls(folder, task, reading=not config.force)

    def save(self, state: Mapping[str, Any], optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        """Keep a trainer's `state_dict` without operators, unless its step is there."""
        names = {name: self._parameter_names(optimizer) for name, optimizer in optimizers.items()}
        if None in names.values() or state["step"] in checkpoint.steps(self.folder):
            return
        tensors = {plain: state["task"][name] for name, plain in self._plain_names(state["task"]).items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / LOCK):
                if state["step"] not in checkpoint.steps(self.folder):  # another run was faster
                    kept = {**state, "task": tensors, "parameter_names": names}
                    checkpoint.save(self.folder, state["step"], kept, kept=None)
        except OSError as error:
            raise explained(error, self.folder) from error

    def load(self, latest: int, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Any] | None:
        """Return the longest prefix of up to `latest` steps as a `state_dict`, or None."""
        saved = checkpoint.load_newest(self.folder, latest=latest) if self.reading else None
        if saved is None:
            return None
        present = self.task.state_dict()
        plain_names = self._plain_names(present)
        if set(plain_names.values()) != saved["task"].keys():
            return None
        optimizers_state = {}
        for name, optimizer in optimizers.items():
            there, groups = saved["parameter_names"][name], self._parameter_names(optimizer)
            if groups is None or [sorted(group) for group in groups] != [sorted(group) for group in there]:
                return None
            # Operators change the order of parameters: torch numbers them as the groups list them
            number = {parameter: i for i, parameter in enumerate(itertools.chain(*there))}
            state = saved["optimizers"][name]
            places = [{"params": [number[parameter] for parameter in group]} for group in groups]
            merged = [old | new for old, new in zip(state["param_groups"], places, strict=True)]
            optimizers_state[name] = state | {"param_groups": merged}
        print_text(
            f"warm start: the first {saved['step']} steps are loaded from {self.folder}, where a run with the same "
            "float prefix left them (trainer.warm_start=false trains them again)"
        )
        tensors = present | {name: saved["task"][plain] for name, plain in plain_names.items()}
        return {**saved, "task": tensors, "optimizers": optimizers_state}

    def _plain_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map names of the task's state, without operators, to those in the float task."""
        operators = {path for path, module in self.task.named_modules() if isinstance(module, Operator)}
        return {name: _plain(name) for name in names if name.rpartition(".")[0] not in operators}

    def _parameter_names(self, optimizer: torch.optim.Optimizer) -> list[list[str]] | None:
        """Return the parameters' float names per group; None if one is not the task's."""
        known = {id(parameter): _plain(name) for name, parameter in self.task.named_parameters()}
        groups = [[known.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
        return None if any("" in group for group in groups) else groups


def _plain(name: str) -> str:
    return _PARAMETRIZED.sub(r"\1", name)
