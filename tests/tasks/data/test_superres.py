from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qprune.errors import UserError
from qprune.tasks.data.images import NamedImage, read_images
from qprune.tasks.data.superres import ImagePairs, low_and_high, luma
from qprune.tasks.metrics.psnr import psnr_db


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 60).convert("RGB")


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [((0, 0, 0), 16.0), ((255, 255, 255), 16 + 218.859 * 255 / 256), ((255, 0, 0), 16 + 64.738 * 255 / 256)],
)
def test_luma_of_plain_colours_by_hand(rgb: tuple[int, int, int], expected: float) -> None:
    assert luma(Image.new("RGB", (1, 1), rgb)).item() == pytest.approx(expected / 255, abs=1e-6)


def test_sizes_are_resized_to_multiples_of_the_scale() -> None:
    image = noise(50, 35)
    low, high = low_and_high(image, 3)
    assert (low.shape, high.shape) == ((11, 16), (33, 48))
    assert torch.equal(high, luma(image.resize((48, 33), Image.Resampling.BICUBIC)))


def test_patches_are_squares_of_the_images_in_their_order() -> None:
    pairs = ImagePairs([NamedImage("a", noise(60, 99)), NamedImage("b", noise(60, 51))], scale=3, smallest=17)
    low, high = pairs.patches(patch=17, stride=13)
    assert (low.shape, high.shape) == ((3, 1, 17, 17), (3, 1, 51, 51))
    first_low, first_high = pairs[0]
    assert torch.equal(low[1], first_low[0, :, 13:30, :17])
    assert torch.equal(high[1], first_high[0, :, 39:90, :51])
    assert torch.equal(low[2], pairs[1][0][0, :, :17, :17])


def test_an_image_smaller_than_a_patch_is_named() -> None:
    with pytest.raises(UserError) as error:
        ImagePairs([NamedImage("tiny.png", noise(50, 90))], scale=3, smallest=17)
    assert str(error.value) == (
        "tiny.png is 50x90 pixels, smaller than a patch of 51x51 (task.patch=17 times task.scale=3); "
        "remove it, or set a smaller task.patch"
    )


def test_pairs_stay_out_of_the_state_dict_and_iterate() -> None:
    pairs = ImagePairs([NamedImage("a", noise(60, 60))], scale=3, smallest=17)
    assert pairs.state_dict() == {}
    assert [low.shape for low, _ in pairs] == [(1, 1, 20, 20)]


def test_the_91_images_make_2701_patches(real_root: Path) -> None:
    pairs = ImagePairs(read_images(real_root / "t91", "task.train_folder"), scale=3, smallest=17)
    low, high = pairs.patches(patch=17, stride=13)
    assert len(pairs) == 91
    assert (low.shape, high.shape) == ((2701, 1, 17, 17), (2701, 1, 51, 51))


def test_bicubic_interpolation_of_set5_reaches_its_known_psnr(real_root: Path) -> None:
    scores = {}
    for name, image in read_images(real_root / "set5", "task.test_folder"):
        width, height = image.width // 3, image.height // 3
        high = image.resize((3 * width, 3 * height), Image.Resampling.BICUBIC)
        low = high.resize((width, height), Image.Resampling.BICUBIC)
        enlarged = low.resize(high.size, Image.Resampling.BICUBIC)
        scores[Path(name).stem] = psnr_db(luma(enlarged), low_and_high(image, 3)[1]).item()
    expected = {"baby": 34.66, "bird": 32.51, "butterfly": 24.52, "head": 34.18, "woman": 28.74}
    assert scores == pytest.approx(expected, abs=0.01)
    assert np.mean(list(scores.values())) == pytest.approx(30.92, abs=0.01)
