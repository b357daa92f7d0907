"""Average precision of object detection as Pascal VOC 2007 defined it (Everingham et al. 2010, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

RECALLS = 11  # 0, 0.1, ..., 1


class Truth(NamedTuple):
    """The objects of an image: boxes (N, 4) as x1, y1, x2, y2 in pixels, labels (N,) and difficult (N,), a bool each.

    Edges are continuous: a VOC box of pixels 3 to 5 reaches from 2 to 5. With such edges the plain overlap equals
    that of the published code, which adds 1 to every width and height.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


class Found(NamedTuple):
    """A detector's output for an image: boxes (M, 4) as in `Truth`, labels (M,) and scores (M,)."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor


def voc07_average_precisions(found: Sequence[Found], truth: Sequence[Truth], overlap: float = 0.5) -> dict[int, float]:
    """Return label -> average precision in [0, 1], for every label with an object that is not difficult.

    A detection is right if its intersection over union with the object of its label that it overlaps most is above
    `overlap`, and no detection of a higher score has that object. Detections of difficult objects are not counted.

    Args:
        found: One entry per image.
        truth: One entry per image.
        overlap: Threshold of the intersection over union.

    Raises:
        ValueError: The lists have different lengths.
    """
    labels = {int(label) for image in truth for label in image.labels[~image.difficult]}
    return {label: _average_precision(label, found, truth, overlap) for label in sorted(labels)}


def eleven_points(right: Tensor, objects: int) -> float:
    """Average over recalls 0, 0.1, ..., 1 the best precision at that recall or a higher one, 0 where none is reached.

    Args:
        right: (M,), whether each detection is right, by falling score.
        objects: Number of objects to find, at least 1.
    """
    hits = right.to(torch.int64).cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    # whole numbers: 3 of 10 objects are a recall of 0.3, which 3 * 0.1 in floating point is above
    reached = [precision[hits * (RECALLS - 1) >= step * objects] for step in range(RECALLS)]
    return sum(float(values.max()) for values in reached if len(values)) / RECALLS


def _average_precision(label: int, found: Sequence[Found], truth: Sequence[Truth], overlap: float) -> float:
    objects = 0
    scores, right = [], []
    for image, target in zip(found, truth, strict=True):
        of_label = target.labels == label
        difficult = target.difficult[of_label]
        objects += int((~difficult).sum())
        mine = image.labels == label
        order = image.scores[mine].argsort(descending=True, stable=True)
        boxes = image.boxes[mine][order]
        judged = _judge(boxes, target.boxes[of_label], difficult, overlap)
        counted = judged >= 0
        scores.append(image.scores[mine][order][counted])
        right.append(judged[counted] == 1)
    by_score = torch.cat(scores).argsort(descending=True, stable=True)
    return eleven_points(torch.cat(right)[by_score], objects)


def _judge(boxes: Tensor, objects: Tensor, difficult: Tensor, overlap: float) -> Tensor:
    """Return 1 right, 0 wrong, -1 not counted, for boxes (M, 4) by falling score and objects (N, 4) of one image."""
    verdict = torch.zeros(len(boxes), dtype=torch.int64)
    if not len(objects) or not len(boxes):
        return verdict
    best, nearest = box_iou(boxes, objects).max(dim=1)
    taken: set[int] = set()
    for row, (value, index) in enumerate(zip(best.tolist(), nearest.tolist(), strict=True)):
        if value <= overlap:
            continue
        if difficult[index]:
            verdict[row] = -1
        elif index not in taken:
            taken.add(index)
            verdict[row] = 1
    return verdict
