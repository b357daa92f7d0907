"""A composed config as checked values: the only place that reads config keys by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from hydra.utils import get_class

from qprune.compression.compressor import Compressor, attach
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.footprint import PaperSize
from qprune.compression.plan import Plan
from qprune.compression.schedule import Schedule, Timeline
from qprune.config.schema import complete_fields
from qprune.config.trusted import require_trusted
from qprune.config.types import check
from qprune.errors import UserError, closest
from qprune.training.layout import arrange
from qprune.training.task import DataOptions, Limits, Task


@dataclass(frozen=True)
class Recipe:
    """What one run does, checked: raises UserError naming the key, before anything is loaded or written."""

    config: dict[str, Any]
    order: tuple[str, ...]
    pruning: PruneConfig | None
    quantization: QuantizeConfig | None
    schedule: Schedule  # in trained epochs
    limits: Limits
    paper_epochs: int

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Recipe:
        """Read a resolved config (plain dicts and lists)."""
        complete_fields(config)
        order = tuple(config["order"]["steps"])
        if len(set(order)) != len(order):
            raise UserError(f"order.steps={list(order)} names an operator twice; type each at most once")
        pruning = _built(PruneConfig, config["prune"], "prune") if "prune" in order else None
        quantize = {key: value for key, value in config["quantize"].items() if key != "decimal_from"}
        if config["quantize"].get("decimal_from"):
            quantize["decimal"] = 0  # fixed from the start, hence no search; the runner fills in the other run's values
        quantization = _built(QuantizeConfig, quantize, "quantize") if "quantize" in order else None
        epochs, budget = config["epochs"], config["budget"]
        schedule = _schedule(config, pruning, quantization)
        schedule.check(order, epochs)
        trained = min(epochs, budget["epochs"] or epochs)
        limits = Limits(trained, budget["steps_per_epoch"], budget["batch_size"], budget["test_samples"])
        return cls(config, order, pruning, quantization, schedule.scaled(trained / epochs), limits, epochs)

    def task(self) -> Task:
        """Build the task named by `task._target_` with the config's arguments, checked; its data is loaded here."""
        arguments = {
            k: v for k, v in self.config["task"].items() if k not in ("_target_", "name", "sites", "paper_size")
        }
        target = self.config["task"]["_target_"]
        require_trusted("task._target_", target)
        try:
            task_class = get_class(target)
        except Exception as error:
            raise UserError(
                f"task._target_={target} cannot be imported ({error}); give the dotted path of a class, for example "
                "qprune.tasks.cifar.Cifar, in a package on the Python path"
            ) from error
        if not issubclass(task_class, Task):
            raise UserError(f"task._target_={target} is not a subclass of qprune.training.task.Task")
        _check_arguments(task_class, arguments, target)
        data = DataOptions(**self.config["data"])
        task: Task = task_class(data=data, limits=self.limits, seed=self.config["seed"], **arguments)
        return task

    def task_on(self, device: torch.device) -> Task:
        """A new task on `device`, its weights laid out as the recipe says, without operators."""
        task = self.task().to(device)
        arrange(task, self.config["trainer"]["channels_last"], self.config["trainer"]["compile"], device)
        return task

    def attached(self, task: Task, sites: Plan | None = None) -> Compressor:
        """This run's operators, placed into the task's network. sites: its plan, if that is at hand."""
        sites = self.plan(task) if sites is None else sites
        return attach(task.network, sites, self.timeline(task), task.example, self.pruning, self.quantization)

    def plan(self, task: Task) -> Plan:
        """The sites of the task's network, with the operators of this run alone."""
        return Plan.from_globs(task.network, **self.config["task"]["sites"]).restricted(self.pruning, self.quantization)

    def timeline(self, task: Task) -> Timeline:
        """The schedule in steps of the task's data. T is `prune.window` for quantizers too (spec 3.2)."""
        data = task.train_batches
        return self.schedule.in_steps(len(data), data.batch_size, self.config["prune"]["window"], data.samples)

    @property
    def paper_size(self) -> PaperSize:
        """What the paper's accounting charges for this task."""
        return PaperSize(**self.config["task"]["paper_size"])


def _schedule(config: Mapping[str, Any], pruning: PruneConfig | None, quantization: QuantizeConfig | None) -> Schedule:
    times = dict(config["schedule"])
    if pruning is None:
        times |= {"t_p": None, "dt_p": None}
    targets = "" if quantization is None else quantization.targets
    if "w" not in targets:
        times["t_qw"] = None
    if "f" not in targets:
        times["t_qf"] = None
    for key, target in (("t_qw", "w"), ("t_qf", "f")):
        if target in targets and times.get(key) is None:
            raise UserError(f"schedule.{key} is missing, and quantize.targets={targets} needs it; give it in epochs")
    schedule: Schedule = _built(Schedule, times, "schedule")
    return schedule


def _built(kind: type, values: Mapping[str, Any], section: str) -> Any:
    legal = inspect.signature(kind).parameters
    for key in values:
        if key not in legal:
            raise UserError(
                f"{section}.{key} is not a key of {section}{closest(key, legal)}; legal: {', '.join(legal)}"
            )
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(f"{section}: a value has the wrong type ({error}); given were {dict(values)}") from error


def _check_arguments(task_class: type[Task], arguments: Mapping[str, Any], target: str) -> None:
    """Raise UserError unless a task's constructor takes these arguments, as its annotations say."""
    legal = {k: v for k, v in inspect.signature(task_class.__init__).parameters.items() if k != "self"}
    for name, parameter in legal.items():
        given_anyway = name in ("data", "limits", "seed", *arguments)
        if parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty and not given_anyway:
            raise UserError(f"task.{name} is missing, and {target} needs it")
    try:
        kinds = get_type_hints(task_class.__init__, include_extras=True)
    except (NameError, TypeError):  # annotations that are only there for a type checker
        kinds = {}
    for key, value in arguments.items():
        if key not in legal or key in ("data", "limits", "seed"):
            raise UserError(f"task.{key} is not an argument of {target}{closest(key, legal)}")
        check(f"task.{key}", value, kinds.get(key, Any))
