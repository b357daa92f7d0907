"""What ONNX answers is what PyTorch answers, to the last bit, wherever it is promised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
import onnx
import onnxruntime
from onnx import TensorProto

from qprune.compression.compressor import Compressor
from qprune.compression.config import PruneConfig
from qprune.compression.convert import with_plain_weights
from qprune.compression.functional import integer_range
from qprune.errors import UserError
from qprune.export import onnx_graph
from qprune.export.float_lowering import exact_program
from qprune.export.integer_lowering import calibrate, integer_program
from qprune.export.program import FixedPoint, Program, Value
from qprune.export.steps import FeatureMask, mask_feature, needs_unsigned, rescale
from qprune.export.trace import trace
from qprune.export.verification import Session
from tests.export.networks import RESIDUAL_PLAN, TANHS_PLAN, Residual, Tanhs, compressed, quantized

EXAMPLE = (1, 3, 8, 8)
ROUNDINGS = ("nearest", "floor", "trunc")


@pytest.fixture(scope="module")
def residual() -> Callable[..., Compressor]:
    made: dict[str, Compressor] = {}

    def of(**quantization: object) -> Compressor:
        key = repr(sorted(quantization.items()))
        if key not in made:
            torch.manual_seed(0)
            made[key] = compressed(Residual(), RESIDUAL_PLAN, EXAMPLE, **quantization)
        return made[key]

    return of


def inputs(count: int = 64) -> Tensor:
    return torch.randn(count, *EXAMPLE[1:], generator=torch.Generator().manual_seed(9))


def exact(compressor: Compressor) -> Program:
    return exact_program(trace(compressor.network, torch.zeros(EXAMPLE)), False)


def integer(compressor: Compressor, weights: str = "auto") -> Program:
    steps = trace(compressor.network, torch.zeros(EXAMPLE))
    return integer_program(steps, False, calibrate(steps, inputs()), weights)


def session(program: Program, dynamic: bool = False) -> Session:
    return Session(program.onnx_bytes(dynamic, {"qprune.task": "test"}))


@torch.no_grad()
def in_float64(compressor: Compressor, x: Tensor) -> Tensor:
    return with_plain_weights(compressor.network).eval().double()(x.double()).float()


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("axis", ["authors", "output", "tensor"])
def test_onnxruntime_equals_pytorch_in_both_folds(
    residual: Callable[..., Compressor], rounding: str, axis: str
) -> None:
    compressor, x = residual(rounding=rounding, weight_axis=axis), inputs()
    program = exact(compressor)
    assert program.exact
    assert torch.equal(session(program)(x), in_float64(compressor, x))
    program = integer(compressor)
    assert program.exact
    runtime = session(program)
    assert torch.equal(runtime(x), program(x))
    assert runtime.kernels["QLinearConv"] == 3


def test_the_integer_network_is_near_the_trained_one(residual: Callable[..., Compressor]) -> None:
    compressor = residual(rounding="nearest", weight_axis="output")
    x = inputs()
    with torch.no_grad():
        trained = compressor.network(x)
    made = session(integer(compressor))(x)
    # one grid was added, before the residual sum; nothing else may move a feature by more than one step
    assert (made - trained).abs().mean() < 0.02 * trained.abs().mean()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_folding_moves_features_by_one_step_at_most_where_no_grid_is_added(rounding: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    plan = quantized("0", "3", features=("1",))
    steps = trace(compressed(network, plan, EXAMPLE, prune=None, rounding=rounding).network, torch.zeros(EXAMPLE))
    ours, theirs = integer_program(steps, False, {}), exact_program(steps, False)
    [name] = [node.name for node in steps.nodes if node.op == "grid" and node.path == "1"]
    a, b = (
        program.run(inputs(256), [program.nodes[name].name])[program.nodes[name].name] for program in (ours, theirs)
    )
    gap = (a - b.clamp(min=0)).abs() / theirs.nodes[name].grid.scale
    assert gap.max() <= 1
    # authors' decimals differ by input channel: the weights themselves are rounded, by less than a percent
    assert (gap > 0).float().mean() < 0.1


def test_layers_with_one_decimal_by_channel_keep_their_whole_numbers(residual: Callable[..., Compressor]) -> None:
    program = integer(residual(rounding="nearest", weight_axis="output"))
    assert not [note for note in program.notes if "rounded" in note["why"]]

    network = Residual()
    with torch.no_grad():  # grids of the inputs' channels that lie far apart: no whole numbers on one grid
        network.conv3.weight[:, 0] *= 64
    program = integer(compressed(network, RESIDUAL_PLAN, EXAMPLE, rounding="nearest", weight_axis="authors"))
    assert "conv3" in {note["path"] for note in program.notes if "rounded" in note["why"]}


def test_a_channel_whose_norm_has_factor_zero_is_its_constant(residual: Callable[..., Compressor]) -> None:
    model = onnx.load_from_string(integer(residual(rounding="nearest", weight_axis="tensor")).onnx_bytes(False, {}))
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert len(weights) == 3
    assert not any(weight[0].any() for weight in weights)  # `compressed` made the first factor of each norm 0


@pytest.mark.parametrize("border", ["tile", "keep"])
@pytest.mark.parametrize("size", [(8, 8), (19, 30), (5, 9)])
def test_masks_are_laid_out_as_in_training_at_any_size(border: str, size: tuple[int, int]) -> None:
    compressor = compressed(Tanhs(), TANHS_PLAN, (1, 1, 8, 8), PruneConfig(border=border), rounding="nearest")
    steps = trace(compressor.network, torch.zeros(1, 1, 8, 8))
    x = torch.rand(2, 1, *size)
    assert torch.equal(session(exact_program(steps, True), dynamic=True)(x), in_float64(compressor, x))
    program = integer_program(steps, True, {})
    assert torch.equal(session(program, dynamic=True)(x), program(x))


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_four_bits_are_packed_and_wide_features_keep_their_grid(bits: int) -> None:
    compressor = compressed(Residual(), RESIDUAL_PLAN, EXAMPLE, bits=bits, feature_bits=12 if bits > 8 else 8)
    program, x = exact(compressor), inputs(8)
    content = program.onnx_bytes(False, {})
    types = {tensor.data_type for tensor in onnx.load_from_string(content).graph.initializer}
    assert (TensorProto.INT4 in types) == (bits <= 4)
    assert (TensorProto.INT16 in types) == (bits > 8)
    tolerance = 0.0 if program.exact else 0.05
    torch.testing.assert_close(Session(content)(x), in_float64(compressor, x), rtol=tolerance, atol=tolerance)
    if bits <= 4:
        whole = integer(compressor)
        assert torch.equal(session(whole)(x), whole(x))
        assert session(whole).kernels["QLinearConv"] == 3


def test_two_products_of_bytes_may_not_need_more_than_16_bits() -> None:
    assert not needs_unsigned(torch.tensor([[127, 127, -128, -128]]), 127)
    assert needs_unsigned(torch.tensor([[127, 127]]), 255)
    assert not needs_unsigned(torch.tensor([[64, 64, -64, -64]]), 255)
    assert needs_unsigned(torch.tensor([[-128, -1]]), 255)
    assert not needs_unsigned(torch.tensor([[-128], [127]]), 255)  # one product alone fits


@pytest.fixture(scope="module")
def worst() -> Compressor:
    """All weights at their ends: what saturates without VNNI where weights are signed bytes."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    plan = quantized("0", features=("1",))
    compressor = compressed(network, plan, EXAMPLE, prune=None, rounding="nearest", weight_axis="tensor", decimal=0)
    with torch.no_grad():
        network[0].parametrizations.weight.original.fill_(127.0)
        network[1].weight.fill_(1e-2)
        network[1].running_var.fill_(1.0)
    return compressor


@pytest.mark.parametrize("weights", ["auto", "safe"])
def test_worst_sums_are_right_on_this_cpu(worst: Compressor, weights: str) -> None:
    program = integer(worst, weights)
    x = torch.full(EXAMPLE, 127.0)
    assert torch.equal(session(program)(x), program(x))
    assert session(program).kernels["QLinearConv"] == 1


def adds_bytes_exactly() -> bool:
    """What a file asks of the CPU that loads it."""
    graph = onnx_graph.GraphBuilder()
    graph.node("Add", "input", graph.node("Cast", graph.exact_int8_sums(), to=TensorProto.FLOAT), output="output")
    return bool(Session(graph.model([1], [1], {}).SerializeToString())(torch.zeros(1)))


def weight_type(content: bytes, folder: Path) -> int:
    """The type of the bytes that the one convolution of a model gets from onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimized.onnx").graph
    [layer] = [node for node in graph.node if node.op_type == "QLinearConv"]
    [weight] = [tensor for tensor in graph.initializer if tensor.name == layer.input[3]]
    return int(weight.data_type)


@pytest.mark.parametrize(("largest_sum", "kind"), [(4 * 255 * 127, TensorProto.INT8), (0, TensorProto.UINT8)])
def test_the_cpu_that_loads_a_file_decides_whether_weights_are_signed(
    worst: Compressor, largest_sum: int, kind: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A CPU that saturates finds another sum than the largest; here the file asks for one that no CPU finds."""
    monkeypatch.setattr(onnx_graph, "LARGEST_SUM", largest_sum)
    program = integer(worst)
    model = onnx.load_from_string(program.onnx_bytes(False, {}))
    assert [node.op_type for node in model.graph.node].count("If") == 1
    runtime = session(program)
    assert [runtime.kernels[op] for op in ("QLinearConv", "If", "MatMulInteger")] == [1, 0, 0]
    if largest_sum == 0 or adds_bytes_exactly():
        assert weight_type(model.SerializeToString(), tmp_path) == kind
    x = torch.full(EXAMPLE, 127.0)
    assert torch.equal(runtime(x), program(x))


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_of_features_of_both_signs_keeps_what_it_keeps_and_the_grid_s_ends(bits: int, dynamic: bool) -> None:
    low, high = integer_range(bits)
    whole = torch.arange(-128, 128).float().view(1, 1, 16, 16).expand(3, 2, 16, 16)
    if dynamic:
        whole = whole.clamp(low, high)  # a layer before such a mask clips
    mask = (torch.arange(2 * 16 * 16).view(2, 16, 16) % 3 > 0).float()
    x = Value("x", "uint8", (1, 2, 16, 16), FixedPoint(3, low, high), 128)
    step = mask_feature(FeatureMask(mask, "tile", dynamic), x)
    graph = onnx_graph.GraphBuilder()
    masked = step.write(graph, rescale(graph, "QuantizeLinear", "input", x))
    graph.node("Identity", rescale(graph, "DequantizeLinear", masked, x), output="output")
    shape: list[int | str] = ["batch", 2, 16, 16]
    made = Session(graph.model(shape, shape, {}).SerializeToString())(whole / 8)
    assert torch.equal(made, step.run(whole.clamp(low, high) / 8))
    assert not torch.equal(made, whole.clamp(low, high) / 8)


def test_without_exact_arithmetic_nothing_is_promised_and_why_is_said() -> None:
    class Normed(Tanhs):
        def forward(self, x: Tensor) -> Tensor:
            return self.shuffle(self.conv2(self.tanh(nn.functional.instance_norm(self.conv1(x)))))

    compressor = compressed(Normed(), TANHS_PLAN, (1, 1, 8, 8), rounding="nearest")
    program = exact_program(trace(compressor.network, torch.zeros(1, 1, 8, 8)), False)
    assert not program.exact
    assert "the instance norm" in program.notes[-1]["why"]
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            session(program)(x), with_plain_weights(compressor.network).eval()(x), rtol=0, atol=0.05
        )


class Function(nn.Module):
    """A linear layer and a function of it."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.function = layer or nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> object:
        return self.function(self.layer, x)


def pool(layer: nn.Module, x: Tensor) -> Tensor:
    return F.avg_pool2d(layer(x), 2, divisor_override=3)


@pytest.mark.parametrize(
    ("network", "shape", "message"),
    [
        (
            Function(lambda m, x: torch.cos(m(x))),
            (1, 4),
            "the operation 'cos' in the network cannot be exported; those",
        ),
        (
            Function(lambda m, x: m(x) if x.sum() > 0 else x),
            (1, 4),
            "Function cannot be traced for export: .*not branch",
        ),
        (
            Function(lambda m, x: (m(x), x)),
            (1, 4),
            "the network returns 2 values, and qprune export writes networks of",
        ),
        (Function(lambda m, x: m(x)), (1, 3, 4), "the linear layer 'layer' returns 3 dimensions, and export writes it"),
        (
            Function(lambda m, x: m(x.reshape(-1, 4))),
            (1, 2, 4),
            "reshape in the network changes the batch, which cannot",
        ),
        (Function(lambda m, x: F.linear(x, m.weight.tanh())), (1, 4), "whose weight is computed cannot be exported"),
        (Function(pool, nn.Conv2d(1, 1, 1)), (1, 1, 4, 4), "divisor_override of the pooling in the network cannot be"),
        (
            nn.Conv2d(1, 1, 3, padding="same"),
            (1, 1, 4, 4),
            "padding='same' of the layer '' cannot be exported; give it",
        ),
        (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), (1, 1, 4, 4), "padding with mode='circular' in the"),
    ],
)
def test_what_cannot_be_exported_is_named(network: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        exact_program(trace(network, torch.zeros(shape)), False).onnx_bytes(False, {})


def test_what_is_done_in_place_is_read_by_all_later_readers() -> None:
    def in_place(layer: nn.Module, x: Tensor) -> Tensor:
        y = layer(x)
        F.dropout(F.relu(y, inplace=True), training=False, inplace=True)
        return y.flatten(2)

    network = Function(in_place, nn.Conv2d(2, 3, 1)).eval()
    x = torch.randn(5, 2, 4, 4)
    program = exact_program(trace(network, x[:1]), False)
    with torch.no_grad():
        torch.testing.assert_close(session(program)(x), network(x))


def test_weights_of_four_bits_stay_in_range_where_a_norm_has_a_negative_factor() -> None:
    network, plan = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)), quantized("0", features=("1",))
    compressor = compressed(network, plan, EXAMPLE, prune=None, bits=4, feature_bits=8, decimal=0, rounding="nearest")
    with torch.no_grad():
        network[0].parametrizations.weight.original.fill_(-8.0)
        network[1].weight.fill_(-1.0)
    program = integer(compressor)
    assert program.exact
    assert torch.equal(session(program)(inputs()), program(inputs()))


def test_a_mean_of_partial_windows_is_on_no_grid() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.AvgPool2d(4, 3, 1, count_include_pad=False))
    program = exact(compressed(network, quantized("0"), EXAMPLE, prune=None))
    assert not program.exact
    assert "the pooling '1' is no mean of a whole map on a grid" in program.notes[-1]["why"]


def test_the_file_says_what_it_is(residual: Callable[..., Compressor]) -> None:
    program = integer(residual(rounding="nearest", weight_axis="output"))
    model = onnx.load_from_string(program.onnx_bytes(False, {"qprune.signature": "abc"}))
    assert {p.key: p.value for p in model.metadata_props} == {"qprune.signature": "abc"}
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, 8, 8]
