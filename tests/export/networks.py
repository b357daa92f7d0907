"""Small compressed networks that cover what export translates, without a task."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qprune.compression.compressor import Compressor, compress
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.plan import INPUT, Plan, Site
from qprune.compression.schedule import Schedule

STEPS = 8


class Residual(nn.Module):
    """A convolution, a residual block with ReLUs, a mean and a linear layer: what MobileNetV2 is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.sum = nn.Identity()
        self.pool = nn.AvgPool2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        hidden = F.relu(self.bn2(self.conv2(x)))
        x = self.sum(x + self.bn3(self.conv3(hidden)))
        return self.linear(self.pool(F.relu(x)).flatten(1))


RESIDUAL_PLAN = Plan(
    (
        *(Site(path, "weight", prune=path == "conv3", quantize=True) for path in ("conv1", "conv2", "conv3", "linear")),
        Site(INPUT, "feature", quantize=True),
        *(Site(path, "feature", prune=True, quantize=True) for path in ("bn1", "bn2", "sum")),
        Site("pool", "feature", quantize=True),
    )
)


def quantized(*weights: str, features: tuple[str, ...] = ()) -> Plan:
    """A plan that quantizes weights, the input and features."""
    paths = [(path, "weight") for path in weights] + [(path, "feature") for path in (INPUT, *features)]
    return Plan(tuple(Site(path, kind, quantize=True) for path, kind in paths))


class Tanhs(nn.Module):
    """Biased convolutions with a tanh between, at any size: what ESPCN is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.tanh = nn.Conv2d(1, 6, 3, padding=1), nn.Tanh()
        self.conv2, self.shuffle = nn.Conv2d(6, 4, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.conv2(self.tanh(self.conv1(x))))


TANHS_PLAN = Plan(
    (
        Site("conv1", "weight", prune=True, quantize=True),
        Site("conv2", "weight", quantize=True),
        Site(INPUT, "feature", quantize=True),
        Site("conv1", "feature", prune=True),
        Site("tanh", "feature", quantize=True),
    )
)


def compressed(
    network: nn.Module,
    plan: Plan,
    shape: tuple[int, ...],
    prune: PruneConfig | None = PruneConfig(),  # noqa: B008
    **quantization: Any,
) -> Compressor:
    """Compress `network` with every operator active, norms with statistics and factors of both signs."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            with torch.no_grad():
                module.weight[0] = 0.0
    schedule = Schedule(t_qw=5, t_qf=6, t_p=1, dt_p=1)
    compressor = compress(network, torch.zeros(shape), schedule, 1, 4, prune, QuantizeConfig(**quantization), plan)
    for step in range(STEPS):
        compressor.at(step)
        network.train()
        network(torch.randn(4, *shape[1:]))
    compressor.at(STEPS)
    network.eval()
    return compressor
