"""DistributedDataParallel as torch has it by default, which broadcasts rank 0's buffers before each forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qprune.compression.compressor import compress
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.distributed import rank_and_world
from qprune.compression.schedule import Schedule
from qprune.training.distributed import launch

BATCH, STEPS = 8, 14
SCHEDULE = Schedule(t_p=2, dt_p=4, n=2, t_qw=11, t_qf=12)  # windows of three steps before steps 6, 10 and 12


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "frozen norm":
        norm = nn.BatchNorm2d(6).eval()
        return nn.Sequential(nn.Conv2d(2, 6, 3), norm, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 2))
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    return nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 2))


def batch(kind: str, step: int) -> Tensor:
    shape = (2, 6, 6) if kind == "frozen norm" else (5, 4)
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(step))


def train(kind: str, parts: int, gradient: str = "ste") -> dict[str, Any]:
    """Train, each step in `parts` backward passes over parts of the batch; rank r of two takes the r-th part."""
    torch.set_num_threads(1)
    net = network(kind)
    prune = PruneConfig(window=3 * BATCH, granularity="element" if kind == "frozen norm" else "last")
    quantize = QuantizeConfig(gradient=gradient)
    compressor = compress(net, batch(kind, 0), SCHEDULE, 1, BATCH, prune, quantize)
    rank, world = rank_and_world()
    wrapped = net if world == 1 else DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        compressor.at(step)
        optimizer.zero_grad()
        shares = batch(kind, step).chunk(max(parts, world))
        for share in shares[rank : rank + 1] if world > 1 else shares:
            net.train()
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            (wrapped(share).square().mean() / (1 if world > 1 else parts)).backward()
        optimizer.step()
    state = {name: value.tolist() for name, value in net.state_dict().items()}
    return state | {"described": compressor.describe()}


CASES = {"frozen norm": ("frozen norm", "ste"), "transformer": ("transformer", "ste")}
CASES["clipped"] = ("frozen norm", "clip_value")


def train_all(parts: int) -> dict[str, dict[str, Any]]:
    """All cases, in one start of two processes."""
    return {case: train(kind, parts, gradient) for case, (kind, gradient) in CASES.items()}


@pytest.fixture(scope="module")
def two() -> dict[str, dict[str, Any]]:
    return launch(2, train_all, 1)


@pytest.mark.parametrize("kind", ["frozen norm", "transformer"])
@pytest.mark.filterwarnings("ignore:most elements stay float")
def test_two_processes_give_the_bits_of_one(kind: str, two: dict[str, dict[str, Any]]) -> None:
    """Against one process that sums the gradients of the same two halves of each batch."""
    one = train(kind, 2)
    assert one.keys() == two[kind].keys()
    for name, value in one.items():
        assert value == two[kind][name], name
    assert all(row["active"] for row in one["described"])


def test_clipped_gradients_are_those_of_the_whole_batch(two: dict[str, dict[str, Any]]) -> None:
    for name, value in train("frozen norm", 1, "clip_value").items():
        if name.endswith((".mask", ".decimal", ".updates")) or name == "described":
            assert value == two["clipped"][name], name
        else:
            assert torch.allclose(torch.tensor(value), torch.tensor(two["clipped"][name]), atol=1e-6), name
