"""The size that a run will end with, before it is trained: operators are placed and masks drawn at random."""

from __future__ import annotations

import copy

import torch

from qprune.compression.compressor import attach
from qprune.compression.footprint import Footprint, actual_footprint
from qprune.compression.pruner import Pruner
from qprune.config.build import Recipe
from qprune.training.setup import build_task, plan_of, timeline_of
from qprune.training.task import Task


class Sizer:
    """Sizes of runs, with tasks that are built once, on synthetic data: sizes do not depend on what is learned.

    Two exceptions: with `prune.rule=threshold` the number of zeros does, and where the mask of a feature is tiled
    over a larger one, the part of a tile at the rim may hold some zeros more or fewer.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def task(self, recipe: Recipe) -> Task:
        """The task of a recipe, without operators."""
        recipe = recipe.on_synthetic_data()
        key = repr((recipe.config.task, recipe.config.data))
        if key not in self._tasks:
            self._tasks[key] = build_task(recipe)
        return self._tasks[key]

    def footprint(self, recipe: Recipe) -> Footprint:
        """The footprint, in the accounting `actual`, that the run of a recipe will end with."""
        task = self.task(recipe)
        network = copy.deepcopy(task.network)
        timeline = timeline_of(recipe, task)
        compressor = attach(network, plan_of(recipe, task), timeline, task.example, recipe.pruning, recipe.quantization)
        generator = torch.Generator().manual_seed(0)
        for placed in compressor.placed:
            operator = placed.operator
            operator.active = True
            if isinstance(operator, Pruner):
                operator.update(torch.rand(operator.mask.shape, generator=generator), 1.0)
        return actual_footprint(network, task.size_example)
