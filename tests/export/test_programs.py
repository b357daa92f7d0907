"""What ONNX answers is what PyTorch answers, to the last bit, wherever it is promised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
import onnx
import onnxruntime
from onnx import TensorProto

from qprune.compression.compressor import Compressor
from qprune.compression.functional import integer_range
from qprune.errors import UserError
from qprune.export import writer
from qprune.export.calibration import missing_decimals
from qprune.export.integer import integer_program
from qprune.export.lowering import exact_program
from qprune.export.program import Grid, Program, Simulation
from qprune.export.runtime import Session
from qprune.export.stored import StoredMask, needs_unsigned
from qprune.export.tracing import trace
from tests.export.networks import RESIDUAL_PLAN, TANHS_PLAN, Residual, Tanhs, compressed

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


def inputs(count: int = 64, shape: tuple[int, ...] = EXAMPLE) -> Tensor:
    return torch.randn(count, *shape[1:], generator=torch.Generator().manual_seed(9))


def integer(compressor: Compressor) -> Program:
    steps = trace(compressor.network, torch.zeros(EXAMPLE))
    decimals = missing_decimals(compressor.bake().eval(), steps, [inputs()])
    return integer_program(steps, False, decimals)


def session(program: Program, dynamic: bool = False) -> Session:
    return Session(program.model(dynamic, {"qprune.task": "test"}).SerializeToString())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("axis", ["authors", "output", "tensor"])
def test_the_exact_model_is_the_trained_network_in_float64(
    residual: Callable[..., Compressor], rounding: str, axis: str
) -> None:
    compressor = residual(rounding=rounding, weight_axis=axis)
    program = exact_program(trace(compressor.network, torch.zeros(EXAMPLE)), False)
    assert program.promise
    x = inputs()
    exact = copy.deepcopy(compressor.bake()).eval().double()
    with torch.no_grad():
        assert torch.equal(session(program)(x), exact(x.double()).float())


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("axis", ["authors", "output", "tensor"])
def test_the_integer_model_is_the_integer_network_in_pytorch(
    residual: Callable[..., Compressor], rounding: str, axis: str
) -> None:
    program = integer(residual(rounding=rounding, weight_axis=axis))
    assert program.promise
    x = inputs()
    runtime = session(program)
    assert torch.equal(runtime(x), Simulation(program)(x))
    assert runtime.kernels["QLinearConv"] == 3


def test_the_integer_network_is_near_the_trained_one(residual: Callable[..., Compressor]) -> None:
    compressor = residual(rounding="nearest", weight_axis="output")
    x = inputs()
    with torch.no_grad():
        trained = compressor.network(x)
    made = session(integer(compressor))(x)
    # one grid was added, before the residual sum; nothing else may move a feature by more than one step
    assert (made - trained).abs().mean() < 0.02 * trained.abs().mean()


def test_folding_moves_features_by_one_step_at_most_where_no_grid_is_added() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    from qprune.compression.plan import INPUT, Plan, Site

    plan = Plan(
        (
            Site("0", "weight", quantize=True),
            Site("3", "weight", quantize=True),
            Site(INPUT, "feature", quantize=True),
            Site("1", "feature", quantize=True),
        )
    )
    for rounding in ROUNDINGS:
        compressor = compressed(copy.deepcopy(network), plan, EXAMPLE, pruning=None, rounding=rounding)
        steps = trace(compressor.network, torch.zeros(EXAMPLE))
        ours, theirs = integer_program(steps, False, {}), exact_program(steps, False)
        name = next(node.name for node in steps.nodes if node.op == "grid" and node.path.startswith("1"))
        x = inputs(256)
        a = Simulation(ours).values(x, [ours.nodes[name].name])[ours.nodes[name].name]
        b = Simulation(theirs).values(x, [theirs.nodes[name].name])[theirs.nodes[name].name]
        grid = theirs.nodes[name].grid
        assert grid is not None
        gap = (a - (b * 2.0**grid.decimal).clamp(min=0)).abs()
        assert gap.max() <= 1, rounding
        # authors' decimals differ by input channel: the weights themselves are rounded, by less than a percent
        assert (gap > 0).float().mean() < 0.1, rounding


def test_layers_with_one_decimal_by_channel_keep_their_whole_numbers(residual: Callable[..., Compressor]) -> None:
    program = integer(residual(rounding="nearest", weight_axis="output"))
    assert not [note for note in program.notes if "rounded" in note["why"]]

    network = Residual()
    with torch.no_grad():  # grids of the inputs' channels that lie far apart: no whole numbers on one grid
        network.conv3.weight[:, 0] *= 64
    program = integer(compressed(network, RESIDUAL_PLAN, EXAMPLE, rounding="nearest", weight_axis="authors"))
    assert "conv3" in {note["path"] for note in program.notes if "rounded" in note["why"]}


def test_a_channel_whose_norm_has_factor_zero_is_its_constant(residual: Callable[..., Compressor]) -> None:
    program = integer(residual(rounding="nearest", weight_axis="tensor"))
    steps = [step for step, _, _ in program.steps if type(step).__name__ == "StoredLayer"]
    assert all(not step.weight[0].any() for step in steps)  # `compressed` made the first factor of each norm 0


@pytest.mark.parametrize("border", ["tile", "keep"])
@pytest.mark.parametrize("size", [(8, 8), (19, 30), (5, 9)])
def test_masks_are_laid_out_as_in_training_at_any_size(border: str, size: tuple[int, int]) -> None:
    from qprune.compression.config import PruneConfig

    compressor = compressed(Tanhs(), TANHS_PLAN, (1, 1, 8, 8), PruneConfig(border=border), rounding="nearest")
    steps = trace(compressor.network, torch.zeros(1, 1, 8, 8))
    exact = copy.deepcopy(compressor.bake()).eval().double()
    x = torch.rand(2, 1, *size)
    with torch.no_grad():
        expected = exact(x.double()).float()
    assert torch.equal(session(exact_program(steps, True), dynamic=True)(x), expected)
    program = integer_program(steps, True, {})
    assert torch.equal(session(program, dynamic=True)(x), Simulation(program)(x))


def test_four_bits_are_packed_and_wide_features_keep_their_grid() -> None:
    for bits in (2, 4, 8, 12):
        compressor = compressed(Residual(), RESIDUAL_PLAN, EXAMPLE, bits=bits, feature_bits=12 if bits > 8 else 8)
        program = exact_program(trace(compressor.network, torch.zeros(EXAMPLE)), False)
        model = program.model(False, {})
        types = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
        assert ("INT4" in types) == (bits <= 4)
        assert ("INT16" in types) == (bits > 8)
        x = inputs(8)
        exact = copy.deepcopy(compressor.bake()).eval().double()
        expected = exact(x.double()).float()
        got = Session(model.SerializeToString())(x)
        if program.promise:
            assert torch.equal(got, expected)
        else:
            torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
        if bits <= 4:
            whole = integer(compressor)
            assert torch.equal(session(whole)(x), Simulation(whole)(x))
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
    from qprune.compression.plan import INPUT, Plan, Site

    plan = Plan(
        (Site("0", "weight", quantize=True), Site(INPUT, "feature", quantize=True), Site("1", "feature", quantize=True))
    )
    compressor = compressed(network, plan, EXAMPLE, pruning=None, rounding="nearest", weight_axis="tensor", decimal=0)
    with torch.no_grad():
        network[0].parametrizations.weight.original.fill_(127.0)
        network[1].weight.fill_(1e-2)
        network[1].running_var.fill_(1.0)
    return compressor


@pytest.mark.parametrize("weights", ["auto", "safe"])
def test_worst_sums_are_right_on_this_cpu(worst: Compressor, weights: str) -> None:
    program = integer_program(trace(worst.network, torch.zeros(EXAMPLE)), False, {}, weights)
    x = torch.full(EXAMPLE, 127.0)
    assert torch.equal(session(program)(x), Simulation(program)(x))
    assert session(program).kernels["QLinearConv"] == 1


def adds_bytes_exactly() -> bool:
    """What a file asks of the CPU that loads it."""
    graph = writer.Writer()
    graph.node("Add", "input", graph.node("Cast", graph.adds_bytes_exactly(), to=TensorProto.FLOAT), output="output")
    return bool(Session(graph.model(("input", [1]), ("output", [1]), {}).SerializeToString())(torch.zeros(1)))


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
    monkeypatch.setattr(writer, "_LARGEST_SUM", largest_sum)
    program = integer_program(trace(worst.network, torch.zeros(EXAMPLE)), False, {})
    model = program.model(False, {})
    assert [node.op_type for node in model.graph.node].count("If") == 1
    runtime = session(program)
    assert [runtime.kernels[op] for op in ("QLinearConv", "If", "MatMulInteger")] == [1, 0, 0]
    if largest_sum == 0 or adds_bytes_exactly():
        assert weight_type(model.SerializeToString(), tmp_path) == kind
    x = torch.full(EXAMPLE, 127.0)
    assert torch.equal(runtime(x), Simulation(program)(x))


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_of_features_of_both_signs_keeps_what_it_keeps_and_the_grid_s_ends(bits: int, dynamic: bool) -> None:
    low, high = integer_range(bits)
    whole = torch.arange(-128, 128).float().view(1, 1, 16, 16).expand(3, 2, 16, 16)
    if dynamic:
        whole = whole.clamp(low, high)  # a layer before such a mask clips
    mask = (torch.arange(2 * 16 * 16).view(2, 16, 16) % 3 > 0).float()
    step = StoredMask(mask, "tile", dynamic, Grid(3, low, high), 128)
    graph = writer.Writer()
    masked = step.write(graph, graph.quantized("input", 3, 128))
    graph.node("Identity", graph.dequantized(masked, 3, 128), output="output")
    shape: list[int | str] = ["batch", 2, 16, 16]
    made = Session(graph.model(("input", shape), ("output", shape), {}).SerializeToString())(whole / 8)
    assert torch.equal(made, step.run(whole.clamp(low, high)) / 8)
    assert not torch.equal(made, whole.clamp(low, high) / 8)


def test_without_exact_arithmetic_nothing_is_promised_and_why_is_said() -> None:
    class Normed(Tanhs):
        def forward(self, x: Tensor) -> Tensor:
            return self.shuffle(self.conv2(self.tanh(nn.functional.instance_norm(self.conv1(x)))))

    compressor = compressed(Normed(), TANHS_PLAN, (1, 1, 8, 8), rounding="nearest")
    program = exact_program(trace(compressor.network, torch.zeros(1, 1, 8, 8)), False)
    assert not program.promise
    assert "the instance norm" in program.notes[-1]["why"]
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(session(program)(x), compressor.bake().eval()(x), rtol=0, atol=0.05)


def test_what_cannot_be_exported_is_named() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(self.linear(x))

    with pytest.raises(UserError, match="the operation 'cos' in the network cannot be exported; those that can are"):
        trace(Cosine(), torch.zeros(1, 4))

    class Branching(Cosine):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) if x.sum() > 0 else x

    with pytest.raises(UserError, match="Branching cannot be traced for export: .*not branch on values"):
        trace(Branching(), torch.zeros(1, 4))

    class Two(Cosine):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.linear(x), x  # type: ignore[return-value]

    with pytest.raises(UserError, match="the network returns 2 values"):
        trace(Two(), torch.zeros(1, 4))


def test_the_file_says_what_it_is(residual: Callable[..., Compressor]) -> None:
    program = integer(residual(rounding="nearest", weight_axis="output"))
    model = program.model(False, {"qprune.signature": "abc"})
    assert {p.key: p.value for p in model.metadata_props} == {"qprune.signature": "abc"}
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, 8, 8]
