"""The size that a run will end with, before it is trained: operators are placed and masks drawn at random."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch

from qprune.compression.compressor import attach
from qprune.compression.footprint import Footprint, actual_footprint
from qprune.compression.pruner import Pruner
from qprune.config.build import Recipe
from qprune.training.task import Task


class Sizer:
    """Sizes of runs, with tasks that are built once, on synthetic data: sizes do not depend on what is learned.

    Two exceptions: with `prune.rule=threshold` the number of zeros does, and where the mask of a feature is tiled
    over a larger one, the part of a tile at the rim may hold some zeros more or fewer.
    """

    def __init__(self) -> None:
        self._tasks: dict[str, Task] = {}

    def task(self, config: Mapping[str, Any]) -> Task:
        """The task of a resolved config, without operators."""
        config = {**config, "data": {**config["data"], "source": "synthetic"}}
        key = json.dumps([config["task"], config["data"]], sort_keys=True)
        if key not in self._tasks:
            self._tasks[key] = Recipe.from_config(config).task()
        return self._tasks[key]

    def footprint(self, config: Mapping[str, Any]) -> Footprint:
        """The footprint, in the accounting `actual`, that the run of a resolved config will end with."""
        recipe, task = Recipe.from_config(dict(config)), self.task(config)
        network = copy.deepcopy(task.network)
        timeline = recipe.timeline(task)
        compressor = attach(network, recipe.plan(task), timeline, task.example, recipe.pruning, recipe.quantization)
        generator = torch.Generator().manual_seed(0)
        for placed in compressor.placed:
            operator = placed.operator
            operator.active = True
            if isinstance(operator, Pruner):
                operator.update(torch.rand(operator.mask.shape, generator=generator), 1.0)
        return actual_footprint(network, task.size_example)
