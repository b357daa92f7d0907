"""Runs of the adversarial tasks on networks of a few hundred weights, through every phase."""

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


def prepared(recipe: Recipe, folder: Path, checkpoint_minutes: float = 0.0) -> tuple[Any, Trainer]:
    """The task and its trainer, with a checkpoint after every step by default."""
    task: Task = build_task(recipe)
    compressor = attach_operators(recipe, task)
    places = folder / "checkpoints", folder / "metrics.csv"
    loop = Loop(
        recipe.limits.epochs, *places, seed=0, checkpoint_minutes=checkpoint_minutes, checkpoint_seconds_apart=0
    )
    return task, Trainer(task, compressor, loop, torch.device("cpu"))


def train(task: Task, epochs: int) -> dict[str, torch.Tensor]:
    """Train for some epochs without operators; return the losses of the last step."""
    for epoch in range(epochs):
        task.begin_epoch(epoch)
        task.train()
        for batch in task.train_batches.epoch(epoch):
            losses = task.train_step(batch)
    return losses
