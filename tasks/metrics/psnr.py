"""Peak signal-to-noise ratio of images."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio


def psnr_db(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the PSNR in dB of one image, peak 1, both clamped to [0, 1], without cropping or rounding.

    Args:
        predicted: Any shape.
        target: The same shape.
    """
    # float32, because a prediction under autocast would limit the error itself to 8 or 11 bits
    return peak_signal_noise_ratio(predicted.float(), target.float(), data_range=(0.0, 1.0))
