"""Projects of hls4ml, compiled with g++: what the hardware computes is what PyTorch computes, to the last bit."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("hls4ml", reason="the extra `hls4ml` is not installed")
pytest.importorskip("qonnx", reason="the extra `qonnx` is not installed")

from qprune.compression.plan import INPUT, Plan, Site
from qprune.export import export_hls4ml
from qprune.tasks.models.espcn import ESPCN
from tests.export.networks import compressed

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


class Classifier(nn.Module):
    """A convolution, a ReLU and a linear layer whose result has no grid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().flatten(1))


class Upscaler(nn.Module):
    """Two convolutions before a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.shuffle = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv2(self.conv1(x).relu()))


@pytest.mark.parametrize(
    ("network", "rounding", "weights", "features"),
    [
        (Classifier(), "trunc", ("conv", "linear"), ("conv",)),
        (Upscaler(), "nearest", ("conv1", "conv2"), ("conv1", "conv2")),
    ],
)
def test_hardware_is_emulated_without_a_difference(
    network: nn.Module, rounding: str, weights: tuple[str, ...], features: tuple[str, ...], tmp_path: Path
) -> None:
    sites = [Site(path, "weight", prune=path == weights[0], quantize=True) for path in weights]
    sites += [Site(path, "feature", prune=path == weights[0], quantize=True) for path in features]
    plan = Plan((Site(INPUT, "feature", quantize=True), *sites))
    compressor = compressed(network, plan, (1, 1, 8, 8), bits=6, rounding=rounding, weight_axis="tensor")
    x = torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    project = export_hls4ml(compressor.network, x, tmp_path)
    assert project.differing(x) == (0, 50 * (64 if isinstance(network, Upscaler) else 5))
    assert project.cut == ("pixel_shuffle" if isinstance(network, Upscaler) else "")
    assert any(kind.startswith("ufixed<5,") for kind in project.types().values())


def test_espcn_is_emulated_without_a_difference_where_each_tanh_reads_a_grid(tmp_path: Path) -> None:
    sites = [Site(path, "weight", prune=path == "conv2", quantize=True) for path in ("conv1", "conv2", "conv3")]
    sites += [Site(path, "feature", quantize=True) for path in (INPUT, "conv1", "tanh1", "tanh2")]
    plan = Plan((*sites, Site("conv2", "feature", prune=True, quantize=True)))
    compressor = compressed(ESPCN(), plan, (1, 1, 4, 4), rounding="floor", weight_axis="tensor")
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    project = export_hls4ml(compressor.network, x, tmp_path)
    assert project.differing(x) == (0, 20 * 9 * 16)
    assert (project.cut, project.rough) == ("pixel_shuffle", [])
