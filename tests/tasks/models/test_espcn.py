import math

import pytest
import torch

from qprune.tasks.models.espcn import ESPCN


def test_initial_weights_are_normal_with_the_stated_deviations() -> None:
    torch.manual_seed(0)
    network = ESPCN()
    for conv, deviation in (
        (network.conv1, math.sqrt(2 / (64 * 25))),
        (network.conv2, math.sqrt(2 / (32 * 9))),
        (network.conv3, 0.001),
    ):
        assert conv.weight.std().item() == pytest.approx(deviation, rel=0.06)
        assert conv.bias is not None
        assert not conv.bias.any()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_output_is_scale_times_as_large(scale: int) -> None:
    assert ESPCN(scale)(torch.zeros(2, 1, 5, 7)).shape == (2, 1, 5 * scale, 7 * scale)
