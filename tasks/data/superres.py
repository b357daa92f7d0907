"""Pairs of low and high resolution from images: luma, bicubic downsampling, and patches for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qprune.errors import UserError
from qprune.tasks.data.images import NamedImage


def luma(image: Image.Image) -> Tensor:
    """Return Y of ITU-R BT.601 (studio swing) of an RGB image, (H, W), unrounded, divided by 255."""
    red, green, blue = np.moveaxis(np.asarray(image, dtype=np.float32), -1, 0)
    return torch.from_numpy((16.0 + (64.738 * red + 129.057 * green + 25.064 * blue) / 256.0) / 255.0)


def low_and_high(image: Image.Image, scale: int) -> tuple[Tensor, Tensor]:
    """Return luma at 1/scale of the image's size, (H, W), and at its size, (scale * H, scale * W).

    Sides that are no multiple of `scale` are first resized to the next smaller one, as the authors do. (Cropping
    instead gives other images and, with bicubic interpolation on Set5, 0.5 dB less.)
    """
    width, height = image.width // scale, image.height // scale
    high = image.resize((width * scale, height * scale), Image.Resampling.BICUBIC)
    return luma(high.resize((width, height), Image.Resampling.BICUBIC)), luma(high)


class ImagePairs(nn.Module):
    """Whole images of different sizes at low and high resolution.

    Item i is a pair of shapes (1, 1, H, W) and (1, 1, scale * H, scale * W), on the module's device.
    Raises UserError for an image that is smaller than `smallest` (pixels, at low resolution) in a direction.
    """

    def __init__(self, images: Sequence[NamedImage], scale: int, smallest: int) -> None:
        super().__init__()
        self.count = len(images)
        for index, (name, image) in enumerate(images):
            least = smallest * scale
            if min(image.size) < least:
                raise UserError(
                    f"{name} is {image.width}x{image.height} pixels, smaller than a patch of {least}x{least} "
                    f"(task.patch={smallest} times task.scale={scale}); remove it, or set a smaller task.patch"
                )
            low, high = low_and_high(image, scale)
            self.register_buffer(f"low{index}", low[None, None], persistent=False)
            self.register_buffer(f"high{index}", high[None, None], persistent=False)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"low{index}"), self.get_buffer(f"high{index}")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(self.count))

    def patches(self, patch: int, stride: int) -> tuple[Tensor, Tensor]:
        """Cut all squares of `patch` pixels at low resolution, `stride` apart, image by image and row by row.

        Returns:
            (N, 1, patch, patch), and the same squares at high resolution, (N, 1, scale * patch, scale * patch).
        """
        lows, highs = [], []
        for low, high in self:
            scale = high.shape[-1] // low.shape[-1]
            lows.append(_squares(low, patch, stride))
            highs.append(_squares(high, patch * scale, stride * scale))
        return torch.cat(lows), torch.cat(highs)


def _squares(image: Tensor, side: int, stride: int) -> Tensor:
    """(1, 1, H, W) -> (N, 1, side, side)."""
    return image.unfold(2, side, stride).unfold(3, side, stride).reshape(-1, 1, side, side)
