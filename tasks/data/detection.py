"""Sets of pictures with boxes, and training batches of these pictures and their mirror images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from qprune.tasks.data.seeds import generator


class Sample(NamedTuple):
    """A picture (3, H, W) in uint8 with its objects.

    boxes (N, 4): x1, y1, x2, y2 in pixels, with continuous edges (a box of pixels 3 to 5 reaches from 2 to 5).
    labels (N,): from 1, in int64. difficult (N,): a bool each. N may be 0.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    difficult: Tensor

    def mirrored(self) -> Sample:
        """Return the sample with left and right swapped."""
        x1, y1, x2, y2 = self.boxes.unbind(1)
        width = self.image.shape[-1]
        return self._replace(image=self.image.flip(-1), boxes=torch.stack((width - x2, y1, width - x1, y2), dim=1))


class DetectionSet(Protocol):
    """Pictures that are decoded at each access; label i is class_names[i - 1]."""

    class_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def checksum(self) -> str:
        """Return the sha256 of pictures and boxes."""
        ...


class DetectionBatches:
    """Batches, as lists of samples, in an order drawn for each epoch from (seed, epoch).

    A set of n pictures has 2n views: 0..n-1 are the pictures, n..2n-1 the same pictures mirrored; an epoch has each of
    `views` once. The last batch of an epoch may be smaller.
    """

    def __init__(self, pictures: DetectionSet, views: Tensor, *, batch_size: int, seed: int) -> None:
        self.pictures, self.views = pictures, views
        self.batch_size, self.samples, self.seed = batch_size, len(views), seed

    def __len__(self) -> int:
        """Return the steps per epoch."""
        return -(-self.samples // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Sample]]:
        """Yield batches of `epoch` from step `start` on: the tail of the uninterrupted epoch."""
        order = torch.randperm(self.samples, generator=generator(self.seed, epoch, "order"))
        for batch in self.views[order].split(self.batch_size)[start:]:
            yield [self._view(int(view)) for view in batch]

    def _view(self, view: int) -> Sample:
        sample = self.pictures[view % len(self.pictures)]
        return sample if view < len(self.pictures) else sample.mirrored()
