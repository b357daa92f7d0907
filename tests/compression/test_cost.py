"""What one pass costs: by hand, against torch's counter, with masks, and the same once converted."""

import copy
import io
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import qprune
from qprune.compression.cost import LayerCost, cost
from tests.compression.test_footprint import trained_block


def layers(network: nn.Module, *shape: int) -> list[tuple[int, int]]:
    """Products and effective ones of each layer."""
    return [(layer.macs, layer.effective_macs) for layer in cost(network, torch.zeros(shape)).layers]


def acting(operator: Any, state: Tensor) -> Any:
    """The operator after its event, with this mask or these decimals."""
    operator.active = True
    operator.updates += 1
    if isinstance(operator, qprune.Pruner):
        operator.mask = state.float()
    else:
        operator.decimal = state.float()
    return operator


def test_a_convolution_with_groups_stride_and_padding() -> None:
    # Of the windows at -1, 1 and 3 of a row of five, 2, 3 and 2 elements are no padding: 7 * 7 of a channel's 81.
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
    assert layers(conv, 1, 2, 5, 5) == [(4 * 81, 4 * 49)]
    with torch.no_grad():
        conv.weight[0] = 0
        conv.weight[1, 0, 1, 1] = 0  # the centre, which lies on no padding: 9 products
    assert layers(conv, 1, 2, 5, 5) == [(4 * 81, 3 * 49 - 9)]


def test_a_depthwise_convolution_with_dilation() -> None:
    conv = nn.Conv2d(3, 3, 2, groups=3, dilation=2)
    with torch.no_grad():
        conv.weight[0, 0, 0, 0] = 0
    assert layers(conv, 1, 3, 4, 4) == [(3 * 4 * 4, 3 * 4 * 4 - 4)]


def test_a_transposed_convolution() -> None:
    whole, cut = nn.ConvTranspose2d(2, 3, 2, stride=2), nn.ConvTranspose2d(2, 3, 2, stride=2, padding=1)
    assert layers(whole, 1, 2, 2, 2) == [(8 * 12, 8 * 12)]
    assert layers(cut, 1, 2, 2, 2) == [(8 * 12, 8 * 3)]  # padding cuts off all but a quarter of what an element makes


def test_a_linear_layer_on_sequences() -> None:
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[1, 2] = 0
    assert layers(linear, 2, 5, 4) == [(2 * 5 * 12, 2 * 5 * 11)]


MASK = torch.tensor([[[1, 0], [0, 1]], [[0, 0], [0, 1]]])  # 3 of 8


def test_masked_features_are_neither_read_nor_computed() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Tanh(), acting(qprune.Pruner(0.5), MASK), nn.Conv2d(2, 3, 1))
    assert layers(network, 1, 1, 2, 2) == [(8, 3), (24, 3 * 3)]
    assert layers(network, 5, 1, 2, 2) == [(40, 15), (120, 45)]
    network[2].mask.zero_()
    assert layers(network, 1, 1, 2, 2) == [(8, 0), (24, 0)]


def test_a_mask_behind_a_pooling_spares_what_the_pooling_reads() -> None:
    pruner = acting(qprune.Pruner(0.5), torch.tensor([[[1, 0], [0, 0]]]))
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.MaxPool2d(2), pruner, nn.Conv2d(1, 1, 1))
    assert layers(network, 1, 1, 4, 4) == [(16, 4), (4, 1)]


def test_zeros_outlive_functions_that_keep_zero_and_no_others() -> None:
    norm = nn.BatchNorm2d(2)
    network = nn.Sequential(acting(qprune.Pruner(0.5), MASK), norm, nn.Conv2d(2, 1, 1))
    assert layers(network, 1, 2, 2, 2) == [(8, 3)]
    with torch.no_grad():
        norm.bias[0] = 1.0  # of the first channel, which then is nowhere zero
    assert layers(network, 1, 2, 2, 2) == [(8, 4 + 1)]


class Fork(nn.Module):
    """A masked feature that a second branch reads before the mask."""

    def __init__(self, read_whole: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 1), nn.Conv2d(4, 1, 1)
        self.pruner, self.read_whole = acting(qprune.Pruner(0.5), MASK), read_whole

    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        kept = self.pruner(made)
        return self.second(torch.cat([kept, made if self.read_whole else kept * kept.sigmoid()], 1))


@pytest.mark.parametrize(("read_whole", "first", "second"), [(True, 8, 3 + 8), (False, 3, 3 + 3)])
def test_an_element_is_spared_if_nothing_reads_it(read_whole: bool, first: int, second: int) -> None:
    assert layers(Fork(read_whole), 1, 1, 2, 2) == [(8, first), (16, second)]


@pytest.mark.parametrize("stride", [1, 2])
def test_effective_products_of_random_masks_are_those_of_unfolded_windows(stride: int) -> None:
    torch.manual_seed(stride)
    mask = torch.rand(3, 7, 7) < 0.4
    conv = nn.Conv2d(3, 4, 3, stride, padding=1)
    with torch.no_grad():
        conv.weight *= torch.rand(4, 3, 3, 3) < 0.5
    after = torch.rand(4, *[-(-7 // stride)] * 2) < 0.6
    network = nn.Sequential(acting(qprune.Pruner(0.5), mask), conv, acting(qprune.Pruner(0.5), after))
    windows = nn.functional.unfold(mask[None].float(), 3, padding=1, stride=stride)[0]
    counts = (conv.weight.flatten(1) != 0).float() @ windows * after.flatten(1)
    assert layers(network, 1, 3, 7, 7)[0][1] == int(counts.sum())


def test_bits_accumulators_bytes_and_energy_by_hand() -> None:
    linear = acting(qprune.Quantizer(4), torch.tensor(1)).on(nn.Linear(3, 2, bias=False))
    linear.parametrizations.weight.original.data = torch.tensor([[3.5, -4.0, 0.0], [0.5, 0.5, 0.5]])
    network = nn.Sequential(acting(qprune.Quantizer(6), torch.tensor(2)), linear)
    (layer,) = cost(network, torch.zeros(1, 3)).layers
    # In steps of 1/2, the first output sums 7 + 8, times at most 2^5: 480 needs 9 bits and the sign.
    expected = LayerCost("1", "mm", 6, 5, 6, 4, 10, weight_bytes=5 * 4 / 8, feature_bytes=3 * 6 / 8 + 2 * 32 / 8)
    assert layer == expected
    assert (layer.bops, layer.effective_bops) == (6 * 24, 5 * 24)
    product, added = 3.1 * 24 / 1024, 0.1 * 10 / 32
    assert layer.energy_pj == pytest.approx(5 * (product + added) + (2.5 + 2.25 + 8) * 100 / 8)
    (floats,) = cost(nn.Linear(3, 2), torch.zeros(1, 3)).layers
    assert floats.accumulator_bits is None
    assert floats.energy_pj == pytest.approx(6 * (3.7 + 0.9) + (24 + 12 + 8) * 100 / 8)


@pytest.mark.parametrize(("axis", "bits"), [(1, 11), (0, 9)])
def test_an_accumulator_of_unequal_decimals(axis: int, bits: int) -> None:
    # 1 in steps of 1, and 1/4 in steps of 1/4. Added up, they share the finer step: (4 + 1) * 128 = 640, 10 bits and
    # the sign. As weights of two outputs, each is 1, times 128: 8 bits and the sign.
    conv = nn.Conv2d(2, 1, 1, bias=False) if axis else nn.Conv2d(1, 2, 1, bias=False)
    conv.weight.data.flatten().copy_(torch.tensor([1.0, 0.25]))
    acting(qprune.Quantizer(4, axis=axis), torch.tensor([0, 2])).on(conv)
    network = nn.Sequential(acting(qprune.Quantizer(8), torch.tensor(3)), conv)
    (layer,) = cost(network, torch.zeros(1, conv.in_channels, 3, 3)).layers
    assert layer.accumulator_bits == bits


def test_no_input_overflows_the_accumulator() -> None:
    torch.manual_seed(0)
    conv = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False)
    acting(qprune.Quantizer(5), torch.tensor(4)).on(conv)
    network = nn.Sequential(acting(qprune.Quantizer(3), torch.tensor(0)), conv)
    (layer,) = cost(network, torch.zeros(1, 4, 9)).layers
    worst = torch.nn.functional.conv_transpose1d(torch.full((1, 4, 9), 4.0), conv.weight.abs() * 16, groups=2).max()
    assert layer.accumulator_bits is not None
    assert 2 ** (layer.accumulator_bits - 2) <= worst < 2 ** (layer.accumulator_bits - 1)


def vit() -> nn.Module:
    return tv.VisionTransformer(16, 8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: tv.resnet18(num_classes=3), 32),
        (lambda: tv.mobilenet_v3_small(num_classes=3), 32),
        (lambda: tv.shufflenet_v2_x0_5(num_classes=3), 32),
        (vit, 16),
        (lambda: tv.SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=3), 16),
    ],
    ids=["resnet18", "mobilenet_v3", "shufflenet", "vit", "swin"],
)
def test_products_are_those_of_torch_s_counter(make: Any, size: int) -> None:
    network, x = make().eval(), torch.zeros(2, 3, size, size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it sees no fused attention
        network(x)
    found = cost(network, x)
    assert found.total()["macs"] == counter.get_total_flops() / 2
    assert found.uncounted == ()


def test_what_cannot_be_counted_is_named() -> None:
    found = cost(nn.LSTM(4, 3, batch_first=True), torch.zeros(2, 5, 4))
    assert found.uncounted
    assert all("not counted: " + name in str(found) for name in found.uncounted)


def test_a_converted_network_costs_and_stores_the_same() -> None:
    network, x = trained_block()
    converted = qprune.convert(network)
    stored = io.BytesIO()
    torch.save(converted, stored)
    stored.seek(0)
    for other in (converted, copy.deepcopy(converted), torch.load(stored, weights_only=False)):
        assert cost(other, x) == cost(network, x)
        for count_masks in (False, True):
            mine, theirs = (qprune.actual_footprint(each, x, count_masks) for each in (other, network))
            assert sorted(mine.entries, key=str) == sorted(theirs.entries, key=str)
        assert qprune.paper_footprint(other, x) == qprune.paper_footprint(network, x)


@pytest.mark.parametrize("border", ["tile", "keep"])
def test_a_converted_network_with_a_tiled_mask_and_a_masked_input(border: str) -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 1, 1)), torch.randn(2, 2, 8, 8)
    plan = qprune.Plan.from_globs(network, ["**"], ["**"], ["input", "0"], ["input", "0"])
    prune, quantize = qprune.PruneConfig(0.5, border=border), qprune.QuantizeConfig(8, decimal=3)
    qprune.attach(network, plan, qprune.Schedule(t_p=1, dt_p=1, n=1).in_steps(1), x, prune, quantize).preview()
    larger = torch.zeros(1, 2, 11, 13)
    converted = qprune.convert(network)
    assert cost(converted, larger) == cost(network, larger)
    sizes = [qprune.actual_footprint(each, larger, count_masks=True).entries for each in (converted, network)]
    assert sorted(sizes[0], key=str) == sorted(sizes[1], key=str)


def test_the_table_and_the_plain_form() -> None:
    network, x = trained_block()
    found = cost(network, x)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", *(layer.name for layer in found.layers), "sum"]
    plain = found.to_dict()
    assert plain["total"] == found.total()
    assert plain["total"]["bops"] == sum(layer["bops"] for layer in plain["layers"])
    assert plain["total"]["accumulator_bits"] == max(layer.accumulator_bits or 0 for layer in found.layers)
