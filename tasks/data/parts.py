"""The part of a data set and of a batch within a budget's limits."""

from __future__ import annotations

import torch
from torch import Tensor

from qprune.training.task import Limits


def part(what: str, total: int, wanted: int | None) -> tuple[Tensor, list[str]]:
    """Return indices of a fixed part of `total` samples, evenly spread over the set, and a mark if it is not the whole.

    The part follows from the config, and is the same in every epoch and run. It is spread, because neighbours may be
    alike (patches of one picture).
    """
    if wanted is None or wanted >= total:
        return torch.arange(total), []
    return torch.arange(wanted) * total // wanted, [f"{what}: {wanted} of {total}"]


def training_part(total: int, recipe_batch: int, limits: Limits) -> tuple[Tensor, int, list[str]]:
    """Return indices of the training samples, samples per batch, and marks.

    With `limits.steps_per_epoch` the training set is cut to that many batches, so that an epoch remains one pass over
    the data.
    """
    batch = recipe_batch if limits.batch_size is None else min(recipe_batch, limits.batch_size)
    marks = [] if batch == recipe_batch else [f"batch size: {batch} instead of {recipe_batch}"]
    wanted = None if limits.steps_per_epoch is None else limits.steps_per_epoch * batch
    indices, cut = part("training set", total, wanted)
    return indices, batch, marks + cut
