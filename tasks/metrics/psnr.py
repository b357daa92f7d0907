"""Peak signal-to-noise ratio of images."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr_db(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR in dB of one image, peak 1, both clamped to [0, 1], without cropping or rounding.

    The result has the bits of torchmetrics' `peak_signal_noise_ratio`, whose import would add 2.5 s to the start of
    each command, for scipy.signal and matplotlib.

    Args:
        predicted: Any shape.
        target: The same shape.
    """
    # float32, because a prediction under autocast would limit the error itself to 8 or 11 bits
    errors = predicted.float().clamp(0, 1) - target.float().clamp(0, 1)
    return -torch.log(errors.square().sum() / errors.numel()) * (10 / torch.log(torch.tensor(10.0)))
