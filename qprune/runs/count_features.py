"""What a finished run lacks because it is older than this version of qprune, made from its trained network."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from qprune.atomic_write import write_json
from qprune.config.build import Recipe
from qprune.errors import UserError
from qprune.runs.decimals import NETWORK_FILE
from qprune.runs.histograms import HISTOGRAMS_FILE
from qprune.runs.store import CONFIG_FILE, read_config
from qprune.training.distributed import choose_device
from qprune.training.setup import attach_operators, build_task
from qprune.training.trainer import Loop, Trainer


def count_features(folder: Path) -> None:
    """Write the histograms of a finished run into its folder, as a run itself does at its end.

    The run's data must be there: where its config says, or below QPRUNE_DATA. Raises UserError naming what is not.
    """
    found = read_config(folder)
    if found is None:
        raise UserError(f"{folder / CONFIG_FILE} is missing or not readable; run its command again with force=true")
    if root := os.environ.get("QPRUNE_DATA"):
        found = {**found, "data": {**found["data"], "root": root}}
    recipe = Recipe.from_config(found)
    config, device = recipe.config, choose_device(recipe.config.trainer.device, 0)
    task = build_task(recipe, device)
    compressor = attach_operators(recipe, task)
    try:
        task.network.load_state_dict(load_file(folder / NETWORK_FILE))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / NETWORK_FILE} does not hold the network of this run ({error})") from error
    task.to(device)
    loop = Loop(recipe.limits.epochs, folder, config.seed, config.trainer.precision)
    trainer = Trainer(task, compressor, loop, device)
    compressor.at(trainer.steps)
    write_json(folder / HISTOGRAMS_FILE, trainer.histograms())
