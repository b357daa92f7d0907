"""From a recipe to what is trained: task, plan, and operators."""

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from hydra.utils import get_class

from qprune.compression.compressor import Compressor, attach
from qprune.compression.plan import Plan
from qprune.compression.schedule import Timeline
from qprune.config.build import Recipe
from qprune.config.schema import naming_keys
from qprune.config.types import check
from qprune.errors import UserError, closest
from qprune.training.compile import arrange
from qprune.training.task import Task

_FROM_RECIPE = ("data", "limits", "seed")  # arguments that every task takes


def build_task(recipe: Recipe, device: torch.device | str = "cpu") -> Task:
    """Build the task of a recipe on a device, with its data, without operators.

    The class is imported, whichever it is. Raises UserError where it cannot be, or does not take the arguments.
    """
    config, device = recipe.config, torch.device(device)
    task_class, arguments = _task_class(config.task.class_path), config.task.arguments
    _check_arguments(task_class, arguments, config.task.class_path)
    if recipe.data.validation and not task_class.validates:
        raise UserError(
            f"data.validation={recipe.data.validation}: the task {config.task.name} keeps no samples apart; leave it "
            "at 0, or choose a task that does, such as espcn or cifar"
        )
    task = task_class(data=recipe.data, limits=recipe.limits, seed=config.seed, **arguments).to(device)
    arrange(task, config.trainer.channels_last, config.trainer.compile, device)
    return task


def plan_of(recipe: Recipe, task: Task) -> Plan:
    """Find the sites of the task's network, with the operators of this recipe alone."""
    sites = recipe.config.task.sites.model_dump()
    try:
        plan = Plan.from_globs(task.network, **sites)
    except UserError as error:
        raise UserError(f"task.sites.{error}") from error
    return plan.restricted(recipe.pruning, recipe.quantization)


@naming_keys()
def timeline_of(recipe: Recipe, task: Task) -> Timeline:
    """Return the schedule in steps; T is that of quantizers too (spec 3.2)."""
    data = task.train_batches
    return recipe.schedule.in_steps(len(data), data.batch_size, recipe.config.prune.window, data.samples)


@naming_keys()
def attach_operators(recipe: Recipe, task: Task, plan: Plan | None = None) -> Compressor:
    """Put the operators of a recipe into the task's network. plan: as of `plan_of`."""
    plan = plan_of(recipe, task) if plan is None else plan
    timeline = timeline_of(recipe, task)
    return attach(task.network, plan, timeline, task.example, recipe.pruning, recipe.quantization)


def learning_rates(task: Task, epochs: int) -> list[float]:
    """Return the learning rate of every epoch, of the first group of the first optimizer."""
    [group, *_] = next(iter(task.optimizers().values())).param_groups
    rates = []
    for epoch in range(epochs):
        task.begin_epoch(epoch)
        rates.append(float(group["lr"]))
    return rates


def _task_class(target: str) -> type[Task]:
    try:
        task_class = get_class(target)
    except Exception as error:
        raise UserError(
            f"task._target_={target} cannot be imported ({error}); give the dotted path of a class, for example "
            "qprune.tasks.cifar.Cifar, in a package on the Python path"
        ) from error
    if not issubclass(task_class, Task):
        raise UserError(f"task._target_={target} is not a subclass of qprune.training.task.Task")
    return task_class


def _check_arguments(task_class: type[Task], arguments: Mapping[str, Any], target: str) -> None:
    legal = {k: v for k, v in inspect.signature(task_class.__init__).parameters.items() if k != "self"}
    for name, parameter in legal.items():
        given = name in (*_FROM_RECIPE, *arguments)
        if parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty and not given:
            raise UserError(f"task.{name} is missing, and {target} needs it")
    try:
        kinds = get_type_hints(task_class.__init__, include_extras=True)
    except (NameError, TypeError):  # annotations that are only there for a type checker
        kinds = {}
    for key, value in arguments.items():
        if key not in legal or key in _FROM_RECIPE:
            raise UserError(f"task.{key} is not an argument of {target}{closest(key, legal)}")
        check(f"task.{key}", value, kinds.get(key, Any))
