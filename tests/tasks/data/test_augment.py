import torch
from torchvision.transforms.v2 import functional as reference

from qprune.tasks.data.augment import CropAndFlip


def test_batch_equals_pad_crop_and_flip_of_each_picture() -> None:
    draws = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (40, 3, 32, 32), generator=draws).to(torch.uint8)
    rows = torch.randperm(40, generator=draws)[:32]
    augment = CropAndFlip(32, 32, padding=4)
    drawn = augment.draw(32, draws)
    batch = augment(pictures, rows, drawn)
    assert batch.dtype == torch.uint8
    for row, (down, right, mirrored), picture in zip(rows, drawn.tolist(), batch, strict=True):
        expected = reference.crop(reference.pad(pictures[row], [4]), down, right, 32, 32)
        assert torch.equal(picture, reference.horizontal_flip(expected) if mirrored else expected)


def test_draws_cover_all_places_evenly_and_flip_half() -> None:
    drawn = CropAndFlip(32, 32, padding=4).draw(90_000, torch.Generator().manual_seed(0))
    for column in (0, 1):
        places, counts = drawn[:, column].unique(return_counts=True)
        assert places.tolist() == list(range(9))
        assert (counts - 10_000).abs().max() < 500
    assert abs(drawn[:, 2].float().mean().item() - 0.5) < 0.01
