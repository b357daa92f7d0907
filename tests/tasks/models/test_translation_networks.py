"""The adversarial networks: sizes of the published ones, shapes, initial weights."""

import pytest
import torch
from torch import nn

from qprune.errors import UserError
from qprune.tasks.models.initialisation import gaussian_
from qprune.tasks.models.patchgan import PatchGAN
from qprune.tasks.models.resnet_generator import ResnetGenerator
from qprune.tasks.models.unet import UNet


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (lambda: UNet(), 54_413_955),
        (lambda: UNet(extra_norm=True), 54_414_083),
        (lambda: ResnetGenerator(), 11_378_179),
        (lambda: ResnetGenerator(norm="batch"), 11_383_427),
        (lambda: PatchGAN(6), 2_768_705),
        (lambda: PatchGAN(3, norm="instance"), 2_764_737),
    ],
)
def test_parameters_are_as_many_as_in_the_published_networks(network: type[nn.Module], expected: int) -> None:
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in network().parameters()) == expected


@pytest.mark.parametrize("depth", [3, 4, 6])
def test_the_u_net_halves_a_picture_depth_times(depth: int) -> None:
    network = UNet(depth, width=4)
    shapes: list[tuple[int, ...]] = []
    network.inner_down.register_forward_hook(lambda *hooked: shapes.append(hooked[2].shape[2:]))
    picture = network(torch.zeros(1, 3, 64, 64))
    assert picture.shape == (1, 3, 64, 64)
    assert shapes == [(64 // 2**depth,) * 2]


def test_dropout_stands_in_the_three_inner_stages_of_full_width() -> None:
    with torch.device("meta"):
        network = UNet()
    assert [up.dropout.p for up in network.ups] == [0.5, 0.5, 0.5, 0, 0, 0]
    assert network.inner_up.dropout.p == 0


def test_a_u_net_without_middle_stages_is_refused() -> None:
    with pytest.raises(UserError, match="task.depth=2 leaves no stage between the outer and the inner one; type 3"):
        UNet(depth=2)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(UserError, match="task.norm='batsch' is not one of instance, batch; did you mean 'batch'?"):
        ResnetGenerator(norm="batsch")


@pytest.mark.parametrize(("size", "patches"), [(256, 30), (64, 6), (24, 1)])
def test_the_discriminator_judges_overlapping_patches(size: int, patches: int) -> None:
    assert PatchGAN(3, width=2)(torch.zeros(2, 3, size, size)).shape == (2, 1, patches, patches)


def test_a_patch_is_70_pixels_wide() -> None:
    network = PatchGAN(1, width=2, norm="batch").eval()
    picture = torch.zeros(1, 1, 160, 160, requires_grad=True)
    network(picture)[0, 0, 8, 8].backward()
    assert picture.grad is not None
    seen = picture.grad[0, 0].abs().sum(dim=0).nonzero()
    assert int(seen.max() - seen.min()) + 1 == 70


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_residual_generator_keeps_the_size(norm: str) -> None:
    assert ResnetGenerator(blocks=1, width=4, norm=norm)(torch.rand(1, 3, 36, 36)).shape == (1, 3, 36, 36)


def test_initial_weights_are_gaussian_with_the_published_deviation() -> None:
    torch.manual_seed(0)
    network = UNet(depth=4, width=16, extra_norm=True)
    gaussian_(network)
    weights = torch.cat([p.flatten() for name, p in network.named_parameters() if "norm" not in name and p.dim() == 4])
    scales = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert weights.mean().item() == pytest.approx(0, abs=1e-3)
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert scales.mean().item() == pytest.approx(1, abs=0.005)
    assert not network.outer_up.bias.any()
