"""Pairs, domains, crops and the pool of Pix2Pix and CycleGAN; files that are broken, missing, grey or of odd width."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from qprune.errors import UserError
from qprune.tasks.data.augment import CropAndFlip
from qprune.tasks.data.facades import read_pairs
from qprune.tasks.data.image_pool import ImagePool
from qprune.tasks.data.synthetic_translation import label_maps_and_pictures, plain_or_striped
from qprune.tasks.data.translation import enlarged, in_bytes, resized, signed
from qprune.tasks.data.unpaired import UnpairedBatches, read_domain

RED, BLUE = (255, 0, 0), (0, 0, 255)


def save_pair(folder: Path, name: str = "1.png", size: tuple[int, int] = (8, 4)) -> None:
    """Red on the left, blue on the right."""
    folder.mkdir(exist_ok=True)
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    image.save(folder / name)


@pytest.mark.parametrize(("direction", "colours"), [("AtoB", RED + BLUE), ("BtoA", BLUE + RED)])
def test_a_pair_is_two_halves_in_the_asked_direction(direction: str, colours: tuple[int, ...], tmp_path: Path) -> None:
    save_pair(tmp_path / "train")
    pairs = read_pairs(tmp_path / "train", "task.train_folder", 6, direction)
    assert pairs.shape == (1, 6, 6, 6)
    assert pairs[0, :, 3, 3].tolist() == list(colours)


def test_a_pair_of_odd_width_is_refused(tmp_path: Path) -> None:
    save_pair(tmp_path / "train", size=(9, 4))
    with pytest.raises(UserError, match=r"1\.png is 9x4: a pair is two pictures .* 9 is odd; crop the file"):
        read_pairs(tmp_path / "train", "task.train_folder", 8, "BtoA")


def test_a_missing_folder_of_pairs_names_those_beside_it(tmp_path: Path) -> None:
    save_pair(tmp_path / "val")
    with pytest.raises(UserError, match=r"no folder .*test; .* holds val: name one of them with task.test_folder="):
        read_pairs(tmp_path / "test", "task.test_folder", 8, "BtoA")
    with pytest.raises(UserError, match="there is no folder"):
        read_pairs(tmp_path / "none" / "test", "task.test_folder", 8, "BtoA")


def test_grey_pictures_among_colour_ones_become_colour_ones(tmp_path: Path) -> None:
    Image.new("RGB", (5, 5), RED).save(tmp_path / "a.png")
    Image.new("L", (7, 5), 100).save(tmp_path / "b.png")
    pictures = read_domain(tmp_path, 4)
    assert pictures.shape == (2, 3, 4, 4)
    assert pictures[:, :, 0, 0].tolist() == [[255, 0, 0], [100, 100, 100]]


def test_empty_missing_and_broken_domains_are_named(tmp_path: Path) -> None:
    (tmp_path / "trainA").mkdir()
    with pytest.raises(UserError, match=r"trainA holds no image .* or type data=synthetic"):
        read_domain(tmp_path / "trainA", 8)
    with pytest.raises(UserError, match=r"no folder .*trainB; fetch the set with: qprune data get horse2zebra"):
        read_domain(tmp_path / "trainB", 8)
    Image.effect_noise((60, 64), 50).save(tmp_path / "trainA" / "a.jpg")
    (tmp_path / "trainA" / "a.jpg").write_bytes((tmp_path / "trainA" / "a.jpg").read_bytes()[:200])
    with pytest.raises(UserError, match=r"a\.jpg cannot be decoded"):
        read_domain(tmp_path / "trainA", 8)


def test_training_pictures_are_a_ninth_larger_and_cut_to_size() -> None:
    assert (enlarged(256), enlarged(64)) == (286, 72)
    stored = torch.arange(2 * 2 * 6 * 6).reshape(2, 2, 6, 6)
    crop = CropAndFlip(4, 6)
    drawn = torch.tensor([[0, 0, 0], [2, 1, 0], [2, 1, 1]])
    cut = crop(stored, torch.tensor([0, 1, 1]), drawn)
    assert torch.equal(cut[0], stored[0, :, :4, :4])
    assert torch.equal(cut[1], stored[1, :, 2:, 1:5])
    assert torch.equal(cut[2], cut[1].flip(-1))


def test_every_place_and_both_sides_are_drawn() -> None:
    drawn = CropAndFlip(4, 6).draw(500, torch.Generator().manual_seed(0))
    assert {tuple(row) for row in drawn.tolist()} == {(y, x, m) for y in range(3) for x in range(3) for m in range(2)}


def test_resizing_is_bicubic() -> None:
    image = Image.effect_noise((12, 10), 80).convert("RGB")
    expected = image.resize((8, 8), Image.Resampling.BICUBIC)
    assert resized([image], 8)[0, :, 2, 3].tolist() == list(expected.getpixel((3, 2)))


def test_bytes_and_signed_pictures_are_inverse_to_one_step() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert [signed(levels).min().item(), signed(levels).max().item()] == [-1, 1]
    assert (in_bytes(signed(levels)).int() - levels.int()).abs().max() <= 1
    assert in_bytes(torch.tensor([-2.0, -1, 0, 1, 2])).tolist() == [0, 0, 127, 255, 255]


def batches(a: int = 3, b: int = 5, size: int = 2) -> UnpairedBatches:
    pictures = [torch.arange(n).view(-1, 1, 1, 1).expand(n, 3, 4, 4).contiguous() for n in (a, b)]
    return UnpairedBatches(*pictures, batch_size=size, seed=0, augmentation=CropAndFlip(4, 4))


def test_an_epoch_of_unpaired_pictures_is_as_long_as_the_larger_domain() -> None:
    data = batches()
    drawn = [(a[:, 0, 0, 0].tolist(), b[:, 0, 0, 0].tolist()) for a, b in data.epoch(0)]
    assert (len(data), data.samples, [len(a) for a, _ in drawn]) == (3, 5, [2, 2, 1])
    assert sorted(row for a, _ in drawn for row in a) == [0, 0, 1, 1, 2]
    assert sorted(int(row) for a, _ in batches(5, 3).epoch(0) for row in a[:, 0, 0, 0]) == [0, 1, 2, 3, 4]


def test_partners_change_from_epoch_to_epoch_and_an_epoch_can_be_entered_in_the_middle() -> None:
    data = batches(4, 50, 1)
    whole, again, other = (torch.stack([b for _, b in data.epoch(epoch)]) for epoch in (0, 0, 1))
    assert torch.equal(whole, again)
    assert not torch.equal(whole, other)
    assert torch.equal(torch.stack([b for _, b in data.epoch(0, start=20)]), whole[20:])


def test_a_pool_returns_what_it_is_given_until_it_is_full_and_older_pictures_half_of_the_time() -> None:
    torch.manual_seed(0)
    pool = ImagePool(10)
    given = [torch.full((1, 3, 2, 2), float(i)) for i in range(1010)]
    first = [pool.exchange(picture) for picture in given[:10]]
    assert all(torch.equal(a, b) for a, b in zip(first, given, strict=False))
    returned = [float(pool.exchange(picture)[0, 0, 0, 0]) for picture in given[10:]]
    new = sum(value == 10 + i for i, value in enumerate(returned))
    assert 430 < new < 570
    assert all(value <= 10 + i for i, value in enumerate(returned))
    assert len(pool.contents()) == 10


def test_a_pool_that_was_refilled_goes_on_as_the_first() -> None:
    def pictures(seed: int) -> torch.Tensor:
        return torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))

    pool, twin = ImagePool(3), ImagePool(3)
    pool.exchange(pictures(0))
    twin.refill(pool.contents(), torch.device("cpu"))
    torch.manual_seed(0)
    expected = pool.exchange(pictures(1))
    torch.manual_seed(0)
    assert torch.equal(twin.exchange(pictures(1)), expected)
    assert torch.equal(ImagePool(0).exchange(pictures(1)), pictures(1))


def test_a_synthetic_picture_can_be_told_from_its_labels() -> None:
    pairs = label_maps_and_pictures(6, 32, "train").float()
    maps, pictures = pairs.chunk(2, dim=1)
    assert pairs.shape == (6, 6, 32, 32)
    for colour in maps.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0):
        here = (maps == colour[None, :, None, None]).all(dim=1)
        assert pictures.permute(0, 2, 3, 1)[here].std(dim=0).max() < 0.5 * pictures.std()
    assert torch.equal(label_maps_and_pictures(6, 32, "train").float(), pairs)
    assert not torch.equal(label_maps_and_pictures(6, 32, "test").float(), pairs)


def test_the_synthetic_domains_differ_in_their_stripes() -> None:
    plain, striped = (part.float() for part in plain_or_striped(8, 32, "train"))
    assert plain.shape == striped.shape == (8, 3, 32, 32)
    steps = [(part[..., 1:] - part[..., :-1]).abs().mean().item() for part in (plain, striped)]
    assert steps[1] > 2 * steps[0]
