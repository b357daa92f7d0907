import numpy as np
import torch

from qprune.tasks.data.checksum import checksum
from qprune.tasks.data.synthetic import classified_gratings, textured_pictures


def test_gratings_repeat_and_hold_as_many_of_each_class() -> None:
    first, again = classified_gratings(200, 100), classified_gratings(200, 100)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.train_images.shape == (200, 3, 32, 32)
    assert first.train_images.dtype == torch.uint8
    assert first.train_labels.bincount().tolist() == [20] * 10
    assert first.test_labels.bincount().tolist() == [10] * 10
    assert not torch.equal(first.train_images[:100], first.test_images)


def test_every_evenly_spread_part_of_the_gratings_holds_all_classes() -> None:
    labels = classified_gratings(5120, 10).train_labels
    assert labels[::10].bincount(minlength=10).min() > 25


def test_mean_colours_alone_do_not_tell_the_class() -> None:
    pictures = classified_gratings(4000, 1000)
    train, test = (images.float().mean(dim=(2, 3)) for images in (pictures.train_images, pictures.test_images))
    means = torch.stack([train[pictures.train_labels == label].mean(dim=0) for label in range(10)])
    nearest = torch.cdist(test, means).argmin(dim=1)
    assert (nearest == pictures.test_labels).float().mean() < 2 / 3


def test_textures_repeat_and_differ_between_training_and_test() -> None:
    def identity(part: str) -> str:
        return checksum(np.asarray(image) for _, image in textured_pictures(2, part=part))

    assert identity("train") == identity("train") != identity("test")
    assert {image.size for _, image in textured_pictures(2)} == {(192, 192)}
