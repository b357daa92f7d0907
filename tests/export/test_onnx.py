"""What a file answers in onnxruntime is what PyTorch answers: to the last bit where that is promised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
import onnx

import qprune
from qprune.compression.compressor import Compressor
from qprune.compression.config import PruneConfig
from qprune.compression.plan import INPUT, Plan, Site
from qprune.errors import UserError
from qprune.export.fixed_point import needs_unsigned
from qprune.export.integer_program import IntegerProgram
from qprune.export.onnx_files import integer_onnx, integers_of
from qprune.export.trace import Inputs
from qprune.export.verification import Session
from tests.export.networks import RESIDUAL_PLAN, TANHS_PLAN, Residual, Tanhs, compressed, quantized

EXAMPLE = (1, 3, 8, 8)


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


def inputs(count: int = 64, shape: tuple[int, ...] = EXAMPLE[1:]) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(9))


def integer(
    network: nn.Module, x: Tensor, weights: str = "auto", any_size: bool = False
) -> tuple[IntegerProgram, Session]:
    given = Inputs.of(x[:1], any_size)
    made = integer_onnx(integers_of(network, given, x), given, weights)
    onnx.checker.check_model(made.model)
    assert made.program is not None
    return made.program, Session(made.model.SerializeToString())


@torch.no_grad()
def equal(program: IntegerProgram, session: Session, x: Tensor) -> bool:
    return not program.rounds and torch.equal(session(x), program.module(x)[0])


@pytest.mark.parametrize(("rounding", "axis"), [("nearest", "output"), ("floor", "tensor"), ("trunc", "authors")])
def test_integers_are_equal_in_pytorch_and_onnxruntime(
    residual: Callable[..., Compressor], rounding: str, axis: str
) -> None:
    program, session = integer(residual(rounding=rounding, weight_axis=axis).network, inputs())
    assert equal(program, session, inputs())
    assert equal(program, session, inputs(1))
    assert session.kernels["QLinearConv"] == 3


def test_the_integer_network_is_near_the_trained_one(residual: Callable[..., Compressor]) -> None:
    compressor, x = residual(rounding="nearest", weight_axis="output"), inputs()
    with torch.no_grad():
        trained = compressor.network(x)
    program, session = integer(compressor.network, x)
    # one grid was added, before the residual sum; nothing else may move a feature by more than one step
    assert (session(x) - trained).abs().mean() < 0.02 * trained.abs().mean()
    assert [note["path"] for note in program.notes if note["kernel"] == "grid"] == ["bn3"]
    assert not [note for note in program.notes if "rounded" in note["why"]]
    assert session.kernels["QGemm"] == 1


def test_weights_with_far_grids_by_input_channel_are_requantized() -> None:
    network = Residual()
    with torch.no_grad():  # grids of the inputs' channels that lie far apart: no whole numbers on one grid
        network.conv3.weight[:, 0] *= 64
    compressor = compressed(network, RESIDUAL_PLAN, EXAMPLE, rounding="nearest", weight_axis="authors")
    program, _ = integer(compressor.network, inputs())
    assert "conv3" in {note["path"] for note in program.notes if "rounded" in note["why"]}


def test_weights_of_four_bits_are_packed() -> None:
    compressor = compressed(Residual(), RESIDUAL_PLAN, EXAMPLE, bits=4, feature_bits=8, weight_axis="output")
    made = integer_onnx(integers_of(compressor.network, Inputs.of(inputs())), Inputs.of(inputs()))
    assert made.program is not None
    kinds = {tensor.data_type for tensor in made.model.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.INT4}
    assert equal(made.program, Session(made.model.SerializeToString()), inputs())


@pytest.mark.parametrize("border", ["tile", "keep"])
def test_masks_are_laid_out_as_in_training_at_any_size(border: str, tmp_path: Path) -> None:
    compressor = compressed(Tanhs(), TANHS_PLAN, (1, 1, 8, 8), PruneConfig(border=border), rounding="nearest")
    qprune.export_onnx(compressor.network, torch.rand(1, 1, 8, 8), tmp_path / "float.onnx", any_size=True)
    program, session = integer(compressor.network, torch.rand(1, 1, 8, 8), any_size=True)
    for size in ((8, 8), (19, 30), (5, 9)):
        x = torch.rand(2, 1, *size)
        found = qprune.verify_onnx(compressor.network, tmp_path / "float.onnx", x)
        assert found.mean_lsb < 0.05
        assert equal(program, session, x)  # a tanh in float64 is rounded to the same side of its grid


def test_two_products_of_bytes_may_not_need_more_than_16_bits() -> None:
    assert not needs_unsigned(torch.tensor([[127, 127, -128, -128]]), 127)
    assert needs_unsigned(torch.tensor([[127, 127]]), 255)
    assert not needs_unsigned(torch.tensor([[64, 64, -64, -64]]), 255)
    assert needs_unsigned(torch.tensor([[-128, -1]]), 255)
    assert not needs_unsigned(torch.tensor([[-128], [127]]), 255)  # one product alone fits


def test_worst_sums_are_right_on_this_cpu() -> None:
    """All weights at their ends: what saturates without VNNI where weights are signed bytes."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    plan = quantized("0", features=("1",))
    compressor = compressed(network, plan, EXAMPLE, prune=None, rounding="nearest", weight_axis="tensor", decimal=0)
    with torch.no_grad():
        network[0].parametrizations.weight.original.fill_(127.0)
        network[1].weight.fill_(1e-2)
        network[1].running_var.fill_(1.0)
    x = torch.full((2, *EXAMPLE[1:]), 127.0)
    for weights in ("auto", "safe"):
        program, session = integer(compressor.network, x, weights)
        assert program.unsigned
        assert equal(program, session, x)
        assert [session.kernels[op] for op in ("QLinearConv", "If")] == [1, 0]


class Operations(nn.Module):
    """Operations that have no code here, each behind a convolution on a grid; their results are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                *(nn.Conv2d(3, 4, 3, padding=1) for _ in range(6)),
                nn.Conv2d(3, 4, 3, padding="same"),
                nn.Conv2d(3, 4, 4, padding="same"),
                nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
                nn.Linear(64, 5),
            ]
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        divided, limited, bounded, folded, flat, changed, same, even, circular, sequence = self.layers
        y = changed(x)
        F.dropout(F.relu(y, inplace=True), training=False, inplace=True)
        return {
            "divisor_override": F.avg_pool2d(divided(x), 2, divisor_override=3),
            "relu6": F.relu6(limited(x)).mean([2, 3]),
            "hardtanh": F.hardtanh(bounded(x), -1.0, 1.0),
            "reshape": folded(x).reshape(-1, 64),
            "flatten": flat(x).flatten(2),
            "in place": y,
            "same": same(x),
            "same, even": even(x),
            "circular": circular(x),
            "(B, T, C)": sequence(x.flatten(2)),
        }


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("form", ["float", "integer"])
def test_operations_of_torch_s_exporter_need_no_code_here(form: str, tmp_path: Path) -> None:
    paths = [f"layers.{i}" for i in range(10)]
    plan = Plan(
        (
            *(Site(path, "weight", quantize=True) for path in paths),
            *(Site(path, "feature", quantize=True) for path in (INPUT, *paths)),
        )
    )
    network = Operations()
    network = compressed(network, plan, EXAMPLE, prune=None, rounding="nearest", weight_axis="output").network
    x, path = inputs(), tmp_path / "network.onnx"
    made = qprune.export_onnx(network, x, path, form=form)
    session = Session(path.read_bytes())
    with torch.no_grad():
        trained = network(x)
        reference = list(trained.values()) if made.program is None else made.program.module(x)
    for name, ours, theirs, near in zip(trained, session.outputs(x), reference, trained.values(), strict=True):
        assert ours.shape == theirs.shape, name
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.04, msg=name)
        torch.testing.assert_close(ours, near, rtol=0, atol=0.15, msg=name)
    if made.program is not None:
        integer = {note["path"] for note in made.program.notes if note["kernel"] == "integer"}
        # padding that is not the same on both sides, and copies that ONNX has no integers for
        assert integer == set(paths) - {"layers.7", "layers.8"}


@pytest.mark.parametrize("sites", [("1", "4", "7"), ("2", "5", "7")], ids=["before", "behind"])
def test_relu6_and_hardtanh_keep_the_grid_in_integers(sites: tuple[str, ...]) -> None:
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Hardtanh()),
        *(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)),
    )
    plan = quantized("0", "3", "6", features=sites)
    compressor = compressed(network, plan, EXAMPLE, prune=None, rounding="nearest", weight_axis="output")
    program, session = integer(compressor.network, inputs())
    assert [note["kernel"] for note in program.notes] == ["integer"] * 3
    assert session.kernels["QLinearConv"] == 3
    assert equal(program, session, inputs())


@pytest.mark.parametrize("sites", [("1", "5"), ("1", "3", "5")], ids=["before", "before and behind"])
def test_padding_by_a_module_keeps_integers(sites: tuple[str, ...]) -> None:
    """As in networks that follow TensorFlow, which pads a stride of 2 on one side alone."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.ZeroPad2d((0, 1, 0, 1))),
        *(nn.Conv2d(8, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)),
    )
    plan = quantized("0", "4", features=sites)
    compressor = compressed(network, plan, EXAMPLE, prune=None, rounding="nearest", weight_axis="output")
    program, session = integer(compressor.network, inputs())
    assert [note["kernel"] for note in program.notes] == ["integer"] * 2
    assert equal(program, session, inputs())


class Two(nn.Module):
    """A network of two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(6, 8)

    def forward(self, left: Tensor, right: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        x = self.a(left) + self.b(right)
        return {"sum": x * scale, "first": x[:, :1]}


@pytest.mark.parametrize(("form", "named"), [("float", True), ("integer", False), ("integer", True)])
def test_several_inputs_and_outputs(form: str, named: bool, tmp_path: Path) -> None:
    network, given = Two(), (torch.rand(5, 4), torch.rand(5, 6))
    example: Any = {"right": given[1], "left": given[0]} if named else given
    plan = qprune.auto_plan(network, example)
    schedule = qprune.Schedule(t_qw=1, t_qf=1, t_p=1, dt_p=1)
    compressor = qprune.compress(network, example, schedule, 1, 4, None, qprune.QuantizeConfig(), plan)
    network.train()
    for step in range(3):
        compressor.at(step)
        network(*given)
    path = tmp_path / "two.onnx"
    qprune.export_onnx(network.eval(), example, path, form=form)
    more = tuple(torch.cat([x, x]) for x in given)
    data: Any = {"right": more[1], "left": more[0]} if named else more
    found = qprune.verify_onnx(network, path, data)
    assert found.elements == 90
    assert found.largest_lsb < (1 if form == "integer" else 1e-4)
    names = [[each.name for each in ends] for ends in (onnx.load(path).graph.input, onnx.load(path).graph.output)]
    assert names == [["input_0", "input_1"], ["output_0", "output_1"]]


def test_what_cannot_be_exported_is_named_with_torch_s_reason(tmp_path: Path) -> None:
    x, path = torch.rand(2, *EXAMPLE[1:]), tmp_path / "network.onnx"

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    branching = Branching()
    with pytest.raises(UserError, match="^Branching cannot be exported: torch.*export says '.*data-dependent"):
        qprune.export_onnx(branching, x, path)
    with pytest.raises(UserError, match="^form='onx' is not one of float, qdq, qonnx, integer"):
        qprune.export_onnx(branching, x, path, form="onx")
    with pytest.raises(UserError, match="^Tanhs has no operators of qprune: give the compressed network itself"):
        qprune.export_onnx(Tanhs(), torch.rand(1, 1, 8, 8), path, form="integer")
    assert not path.exists()
