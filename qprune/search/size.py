"""The size that a run will end with, before it is trained."""

import copy

from qprune.compression.compressor import attach
from qprune.compression.footprint import Footprint, actual_footprint
from qprune.config.build import Recipe
from qprune.config.schema import RunConfig
from qprune.training.setup import build_task, plan_of, timeline_of
from qprune.training.task import Task


def task_of(config: RunConfig) -> Task:
    """Build the task of a config on synthetic data: sizes depend on no data."""
    return build_task(Recipe.from_config(config).on_synthetic_data())


def planned_footprint(task: Task, config: RunConfig) -> Footprint:
    """Return the footprint (`actual`) that the run of a config will end with.

    Masks are random, since sizes do not depend on what is learned. Two exceptions: the number of zeros of
    `prune.rule=threshold`, and some zeros at the rim where the mask of a feature is tiled over a larger one.
    """
    recipe, network = Recipe.from_config(config), copy.deepcopy(task.network)
    plan, timeline = plan_of(recipe, task), timeline_of(recipe, task)
    compressor = attach(network, plan, timeline, task.example, recipe.pruning, recipe.quantization)
    compressor.preview()
    return actual_footprint(network, task.size_example)
