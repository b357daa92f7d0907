"""Runs of the adversarial tasks on networks of a few hundred weights, through every phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qprune.config.build import Recipe
from qprune.training.setup import attach_operators, build_task
from qprune.training.task import Task
from qprune.training.trainer import Loop, Trainer
from tests.faults.recipes import config_of


def recipe_of(task: str, *overrides: str) -> Recipe:
    """A run of 4 epochs of 10 steps on synthetic pictures of 32 pixels."""
    budget = ("budget=smoke", "budget.steps_per_epoch=10", "budget.test_samples=3", "prune.window=3")
    tiny = {"pix2pix": ("task.depth=3",), "cyclegan": ("task.blocks=1", "task.pool_size=2")}[task]
    small = ("data=synthetic", "task.image_size=32", "task.width=4", *tiny)
    return Recipe.from_config(config_of(f"task={task}", *budget, *small, *overrides))


def prepared(recipe: Recipe, folder: Path) -> tuple[Any, Trainer]:
    """The task and its trainer, with a checkpoint after every step."""
    task: Task = build_task(recipe)
    compressor = attach_operators(recipe, task)
    places = folder / "checkpoints", folder / "metrics.csv"
    loop = Loop(recipe.limits.epochs, *places, seed=0, checkpoint_minutes=0.0, checkpoint_seconds_apart=0.0)
    return task, Trainer(task, compressor, loop, torch.device("cpu"))


class KilledError(Exception):
    """Stands for a process that died between two instructions."""


def killed(recipe: Recipe, folder: Path, step: int) -> None:
    """Train until `step` is about to begin, and die."""
    task, trainer = prepared(recipe, folder)
    train_step = task.train_step

    def dying(batch: Any) -> Any:
        if trainer.step == step:
            raise KilledError
        return train_step(batch)

    task.train_step = dying
    try:
        trainer.fit()
    except KilledError:
        return
    raise AssertionError(f"the run never came to step {step}")


def assert_same_state(a: Task, b: Task) -> None:
    """Weights, statistics, operators and memory, to the last bit."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for name, pictures in a.memory().items():
        assert all(torch.equal(x, y) for x, y in zip(pictures, b.memory()[name], strict=True)), name
