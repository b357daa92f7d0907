"""The part of a data set and of a batch within a budget's limits."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from qprune.errors import UserError
from qprune.training.task import Limits


def spread(total: int, wanted: int | None) -> Tensor:
    """Return the indices of `wanted` of `total` samples, or of all, evenly spread over the set.

    They follow from the config, and are the same in every epoch and run. They are spread, because neighbours may be
    alike (patches of one picture).
    """
    return torch.arange(total) if wanted is None or wanted >= total else torch.arange(wanted) * total // wanted


def part(what: str, total: int, wanted: int | None) -> tuple[Tensor, list[str]]:
    """Return the indices of a part of a set, as `spread` does, and a mark if it is not the whole."""
    rows = spread(total, wanted)
    return rows, [] if len(rows) == total else [f"{what}: {wanted} of {total}"]


def kept_apart(total: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Return the indices to train on, and those that `data.validation` keeps apart, evenly spread over the set.

    They follow from the config alone, so that runs of all seeds choose by the same samples.
    """
    count = math.floor(Fraction(repr(fraction)) * total)
    if fraction and not count:
        raise UserError(
            f"data.validation={fraction} of {total} training samples is none; type 0, or at least {1 / total:.2g}"
        )
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[spread(total, count)] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


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
