"""Losses of a generator against a discriminator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logistic_loss(logits: Tensor, real: bool) -> Tensor:
    """Return the cross entropy of logits (N, 1, H, W) against `real` or not: the vanilla objective of Pix2Pix."""
    return F.binary_cross_entropy_with_logits(logits.float(), torch.full_like(logits, float(real)).float())


def square_loss(logits: Tensor, real: bool) -> Tensor:
    """Return the mean squared distance of logits (N, 1, H, W) to 1 (real) or 0: the objective of CycleGAN."""
    return F.mse_loss(logits.float(), torch.full_like(logits, float(real)).float())
