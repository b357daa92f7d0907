"""Batches of pictures with boxes, and the synthetic set."""

import torch

from qprune.tasks.data.detection import DetectionBatches, Sample
from qprune.tasks.data.synthetic_detection import COLOURS, SHAPES, ShapePictures


def batches(views: int = 14, size: int = 4) -> DetectionBatches:
    return DetectionBatches(ShapePictures(7, size=32), torch.arange(views), batch_size=size, seed=3)


def same(one: Sample, other: Sample) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_mirroring_moves_boxes_along_and_twice_is_nothing() -> None:
    image = torch.zeros(3, 8, 10, dtype=torch.uint8)
    image[:, 2:4, 1:4] = 255
    sample = Sample(image, torch.tensor([[1.0, 2, 4, 4]]), torch.tensor([1]), torch.tensor([False]))
    [[x1, y1, x2, y2]] = sample.mirrored().boxes.int().tolist()
    assert (x1, y1, x2, y2) == (6, 2, 9, 4)
    assert sample.mirrored().image[:, y1:y2, x1:x2].min() == 255
    assert sample.mirrored().image.sum() == image.sum()
    assert same(sample.mirrored().mirrored(), sample)


def test_an_epoch_has_every_picture_once_as_it_is_and_once_mirrored() -> None:
    data = batches()
    seen = [sample for batch in data.epoch(0) for sample in batch]
    assert len(data) == 4
    assert len(seen) == data.samples == 14
    for sample in data.pictures.samples:  # type: ignore[attr-defined]
        assert sum(same(sample, other) for other in seen) == 1
        assert sum(same(sample.mirrored(), other) for other in seen) == 1


def test_an_epoch_is_a_function_of_seed_and_number_and_can_begin_anywhere() -> None:
    whole = list(batches().epoch(5))
    for start in range(4):
        tail = list(batches().epoch(5, start))
        assert [len(batch) for batch in tail] == [4, 4, 4, 2][start:]
        assert all(same(a, b) for x, y in zip(tail, whole[start:], strict=True) for a, b in zip(x, y, strict=True))
    other = next(batches().epoch(6))
    assert not all(same(a, b) for a, b in zip(other, whole[0], strict=True))


def test_only_the_views_that_are_chosen_come() -> None:
    data = DetectionBatches(ShapePictures(7, size=32), torch.tensor([2, 9]), batch_size=1, seed=0)
    seen = [sample for [sample] in data.epoch(0)]
    expected = [data.pictures[2], data.pictures[2].mirrored()]
    assert all(any(same(sample, other) for other in seen) for sample in expected)


def test_synthetic_boxes_are_those_of_their_shapes() -> None:
    """Inside a box that touches no other, the shape's colour reaches all four edges and nothing lies outside."""
    for sample in ShapePictures(12, size=64).samples:
        if len(sample.boxes) != 1 or sample.difficult.any():
            continue
        x1, _, x2, y2 = sample.boxes[0].int().tolist()
        colour = torch.tensor(COLOURS[int(sample.labels) - 1])[:, None, None]
        near = ((sample.image.float() - colour).abs() < 60).all(dim=0)
        rows, columns = near.any(dim=1).nonzero().flatten(), near.any(dim=0).nonzero().flatten()
        assert (columns.min() - x1).abs() <= 2
        assert (columns.max() + 1 - x2).abs() <= 2
        assert (rows.max() + 1 - y2).abs() <= 2


def test_the_synthetic_set_is_its_own_seed_s_and_its_parts_differ() -> None:
    train, again, test = ShapePictures(4), ShapePictures(4), ShapePictures(4, part="test")
    assert train.checksum() == again.checksum() != test.checksum()
    samples = ShapePictures(100, size=48).samples
    boxes = torch.cat([sample.boxes for sample in samples])
    assert boxes.min() >= 0
    assert boxes.max() <= 48
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 12
    labels = torch.cat([sample.labels for sample in samples])
    assert set(labels.tolist()) == set(range(1, len(SHAPES) + 1))
    assert 0.02 < torch.cat([sample.difficult for sample in samples]).float().mean() < 0.2
