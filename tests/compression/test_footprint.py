"""Sizes: the paper's elements from our own counting, and the actual accounting by hand (Table 5: tests/cli)."""

import torch
from torch import Tensor, nn

from qprune.compression.compressor import Compressor, compress
from qprune.compression.config import PruneConfig, QuantizeConfig
from qprune.compression.footprint import Footprint, PaperSize, actual_footprint, paper_footprint
from qprune.compression.pruner import Pruner
from qprune.compression.quantizer import Quantizer
from qprune.compression.schedule import Schedule

P_W, P_WF, Q = PruneConfig(0.5, "w"), PruneConfig(0.5, "wf"), QuantizeConfig(8)


class Block(nn.Module):
    """Two convolutions and a shortcut, with everything that the accounting has to see through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.pool, self.linear = nn.MaxPool2d(2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.relu(self.norm1(self.first(x)))
        total = torch.relu(self.norm2(self.second(first)) + first)
        return self.linear(self.pool(total).flatten(1))


def trained_block() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network, x = Block(), torch.randn(2, 1, 4, 4)
    schedule = Schedule(t_p=0, dt_p=1, n=1, t_qw=1, t_qf=1)
    compressor = compress(network, x, schedule, 1, 2, PruneConfig(0.5), QuantizeConfig(8, feature_bits=6))
    for step in range(3):
        compressor.at(step)
        network(x)
    return network, x[:1]


def test_actual_sizes_by_hand() -> None:
    network, x = trained_block()
    footprint = actual_footprint(network, x)
    sizes = [(e.name, e.kind, e.elements, e.bits, e.density) for e in footprint.entries if e.kind != "weight"]
    assert sizes == [
        ("input", "input", 16, 6, 1.0),
        ("norm1", "feature", 64, 6, 1.0),  # after norm, quantizer and ReLU: one stored tensor, still on the grid
        ("norm2", "feature", 64, 32, 1.0),  # the residual sum: no quantizer made it, so it is charged as float
        ("pool", "feature", 16, 6, 0.5),  # the first module that returns it
        ("linear", "feature", 3, 32, 1.0),
    ]
    weights = {e.name: (e.elements, e.bits, e.density) for e in footprint.entries if e.kind == "weight"}
    assert weights == {
        "first.weight": (36, 8, 1.0),
        "first.bias": (4, 32, 1.0),
        "norm1.weight": (4, 32, 1.0),
        "norm1.bias": (4, 32, 1.0),
        "second.weight": (144, 8, 0.5),
        "norm2.weight": (4, 32, 1.0),
        "norm2.bias": (4, 32, 1.0),
        "linear.weight": (48, 8, 1.0),
        "linear.bias": (3, 32, 1.0),
    }
    masks = actual_footprint(network, x, count_masks=True)
    assert (
        masks.size_bits("mask") == 144 + 16
    )  # one bit for each entry of the masks of `second` and of what it makes, pooled


def test_functions_that_keep_zero_keep_the_mask() -> None:
    # As in ESPCN (spec 3.3): pruned before the activation, quantized after it.
    network = nn.Sequential(nn.Conv2d(1, 2, 1), Pruner(0.5), nn.Tanh(), Quantizer(8), nn.Conv2d(2, 1, 1))
    compressor = Compressor(network, Schedule(t_p=0, dt_p=1, n=1, t_qf=2).in_steps(1), torch.zeros(1, 1, 4, 4))
    for step in range(3):
        compressor.at(step)
        network(torch.ones(1, 1, 4, 4))
    features = [e for e in actual_footprint(network, torch.zeros(1, 1, 4, 4)).entries if e.kind == "feature"]
    assert [(e.elements, e.bits, e.density) for e in features] == [(32, 8, 0.5), (16, 32, 1.0)]


def test_an_unchanged_network_is_charged_32_bits() -> None:
    network = Block()
    footprint = actual_footprint(network, torch.zeros(1, 1, 4, 4))
    assert {entry.bits for entry in footprint.entries} == {32}
    assert footprint.elements("weight") == sum(p.numel() for p in network.parameters())


def test_both_accountings_ignore_operators_in_the_way() -> None:
    network, x = trained_block()
    plain, attached = (paper_footprint(n, x, PaperSize(), P_WF, Q) for n in (Block(), network))
    assert [(e.name, e.elements) for e in plain.entries] == [(e.name, e.elements) for e in attached.entries]


def mobilenet_v2(pruning: PruneConfig | None, quantization: QuantizeConfig | None) -> Footprint:
    from qprune.tasks.models.mobilenetv2 import MobileNetV2

    return paper_footprint(MobileNetV2(), torch.zeros(1, 3, 32, 32), PaperSize(), pruning, quantization)


def test_elements_of_mobilenet_v2() -> None:
    footprint = mobilenet_v2(P_WF, Q)
    assert (footprint.elements("feature"), footprint.elements("weight")) == (6_899_732, 2_296_922)
    assert round(footprint.size_bits("weight") / 1e6, 2) == 9.19
    assert round(mobilenet_v2(P_W, Q).size_bits("feature") / 1e6, 2) == 55.20


def test_elements_of_espcn() -> None:
    from qprune.tasks.models.espcn import ESPCN

    footprint = paper_footprint(ESPCN(3), torch.zeros(1, 1, 170, 170), PaperSize(count_input=True), None, None)
    assert [footprint.elements(kind) for kind in ("feature", "weight", "input")] == [6_069_000, 22_729, 28_900]


def test_what_is_left_float_is_charged_as_such_whatever_is_asked_for() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    size = PaperSize(pruned_weights=["1"], pruned_features=["1"], left_float=["0"])
    footprint = paper_footprint(network, torch.zeros(1, 1, 3, 3), size, P_WF, Q)
    assert [(e.name, e.kind, e.size_bits) for e in footprint.entries] == [
        ("0", "weight", 2 * 32),
        ("1", "weight", 2 * 8 * 0.5),
        ("0", "feature", 2 * 18 * 32),
        ("1", "feature", 2 * 9 * 8 * 0.5),
    ]
