"""The Frechet distance against its closed form, what it is called, and Inception weights that are others."""

from pathlib import Path

import pytest
import torch

from qprune.errors import UserError
from qprune.tasks.metrics.fid import WEIGHTS_FILE, FrechetDistance, RandomFeatures, inception_weights
from qprune.tasks.pix2pix import Pix2Pix
from qprune.training.task import DataOptions, Limits


def pictures(count: int, brightness: float, seed: int) -> torch.Tensor:
    noise = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return (255 * (brightness + 0.3 * noise)).to(torch.uint8)


def test_fid_proxy_is_zero_between_a_set_and_itself_and_grows_with_the_difference() -> None:
    distance = FrechetDistance("proxy")
    real = pictures(40, 0.2, seed=0)
    same, near, far = (distance(real, other) for other in (real, pictures(40, 0.25, 1), pictures(40, 0.6, 1)))
    assert same == pytest.approx(0, abs=1e-4)
    assert same < near < far
    assert distance.name == "fid_proxy"


def test_fid_is_the_distance_of_two_gaussians() -> None:
    real, made = pictures(300, 0.2, seed=0), pictures(200, 0.4, seed=1)
    x, y = (RandomFeatures()(part).double() for part in (real, made))
    product = torch.cov(x.T) @ torch.cov(y.T)
    root = torch.linalg.eigvals(product).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * root
    assert FrechetDistance("proxy")(real, made) == pytest.approx(expected.item(), rel=1e-3)


def test_fid_proxy_does_not_depend_on_what_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = FrechetDistance("proxy")(pictures(8, 0.2, 0), pictures(8, 0.4, 1))
    torch.manual_seed(2)
    assert FrechetDistance("proxy")(pictures(8, 0.2, 0), pictures(8, 0.4, 1)) == first


def test_fid_of_a_single_picture_is_refused() -> None:
    with pytest.raises(UserError, match="fid_proxy compares sets of pictures, and one of them holds 1; give budget.te"):
        FrechetDistance("proxy")(pictures(1, 0.2, 0), pictures(8, 0.2, 0))


def test_missing_inception_weights_are_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        FrechetDistance("inception", str(tmp_path / "none.pth"))
    told = str(error.value)
    where = f"at {tmp_path / 'none.pth'}"
    assert told.startswith(f"there are no Inception weights {where}, and FID needs them; fetch https:")
    assert "task.inception_weights=FILE" in told
    assert told.endswith("or type task.fid=proxy for a stand-in that needs no file and is called fid_proxy")


def test_inception_weights_with_another_checksum_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / WEIGHTS_FILE).write_bytes(b"not the network")
    with pytest.raises(UserError, match=r"is not the Inception network of FID: its sha256 is \w{8}\.\.\., not 6726"):
        inception_weights(None)


@pytest.mark.parametrize(
    ("data", "limits"),
    [(DataOptions("synthetic"), Limits(2)), (DataOptions("synthetic"), Limits(2, steps_per_epoch=3))],
)
def test_auto_fid_takes_the_proxy_for_anything_less_than_the_recipe(data: DataOptions, limits: Limits) -> None:
    task = Pix2Pix(data=data, limits=limits, seed=0, image_size=32, width=2)
    assert task.metric == "fid_proxy"
    assert "fid" not in task.evaluate()


def test_auto_fid_wants_inception_for_the_whole_recipe(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.pth")
    with pytest.raises(UserError, match="there are no Inception weights"):
        Pix2Pix(data=DataOptions("real", str(tmp_path)), limits=Limits(300), seed=0, inception_weights=missing)
