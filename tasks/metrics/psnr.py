"""Peak signal-to-noise ratio of images."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio


def psnr_db(predicted: Tensor, target: Tensor) -> Tensor:
    """PSNR in dB of one image, peak 1, after both were clamped to [0, 1]; no border is cropped, nothing is rounded.

    predicted, target: the same shape, any number of dimensions. Returns a scalar.
    """
    # float32, because a prediction under autocast would limit the error itself to 8 or 11 bits
    return peak_signal_noise_ratio(predicted.float(), target.float(), data_range=(0.0, 1.0))
