"""Files that hold grids as nodes, or as whole numbers: every reader computes what PyTorch computes."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
import onnx

import qprune
from qprune.compression.compressor import Compressor
from qprune.compression.plan import INPUT, Plan, Site
from qprune.export import export_integers
from qprune.export.grid_forms import QDQ, QONNX
from qprune.export.integers import fixed_type
from qprune.export.onnx_files import OPSET, plain_onnx, quant_graph_of, to_onnx
from qprune.export.quant_graph import rewrite
from qprune.export.trace import Inputs, quantized_weights, trace
from qprune.export.verification import QuantSession, Session
from qprune.tasks.models.espcn import ESPCN
from tests.export.networks import RESIDUAL_PLAN, TANHS_PLAN, Residual, Tanhs, compressed

EXAMPLE = (1, 3, 8, 8)
X = torch.randn(6, *EXAMPLE[1:], generator=torch.Generator().manual_seed(9))


def residual(rounding: str, axis: str) -> Compressor:
    return compressed(Residual(), RESIDUAL_PLAN, EXAMPLE, rounding=rounding, weight_axis=axis)


class Grids(nn.Module):
    """Grids of 2 to 16 bits, with and without a sign, in all roundings."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            torch.ops.qprune.grid(x if signed else x.relu(), bits, decimal, rounding, "", signed)
            for bits, decimal in zip(range(2, 17), range(-1, 14), strict=True)
            for rounding in ("trunc", "floor", "nearest")
            for signed in (True, False)
        ]


@pytest.mark.parametrize("form", ["qdq", "qonnx"])
def test_grids_of_2_to_16_bits_have_the_same_numbers(form: str) -> None:
    if form == "qonnx":
        pytest.importorskip("qonnx", reason="the extra `qonnx` is not installed")
    # numbers on the grids, between them, on ties and beyond their ends
    x = torch.cat([torch.arange(-4096, 4096) / 2.0**k for k in (14, 8, 3, -3)]).view(4, -1)
    model = to_onnx(Grids(), Inputs.of(x), QONNX if form == "qonnx" else QDQ, OPSET)
    session = QuantSession(model) if form == "qonnx" else Session(model.SerializeToString())
    for ours, theirs in zip(Grids()(x), session.outputs(x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("rounding", "axis"), [("floor", "tensor"), ("trunc", "authors"), ("nearest", "output")])
def test_quant_nodes_compute_the_network(rounding: str, axis: str, tmp_path: Path) -> None:
    pytest.importorskip("qonnx", reason="the extra `qonnx` is not installed")
    compressor, path = residual(rounding, axis), tmp_path / "network.onnx"
    qprune.export_onnx(compressor.network, X, path, form="qonnx")
    found = qprune.verify_onnx(compressor.network, path, X)
    assert (found.elements, found.differing) == (30, 0)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "Quant"]
    modes = [onnx.helper.get_node_attr_value(node, "rounding_mode").decode() for node in nodes]
    assert sorted(set(modes)) == sorted({"ROUND", {"trunc": "DOWN", "floor": "FLOOR", "nearest": "ROUND"}[rounding]})
    assert {onnx.helper.get_node_attr_value(node, "narrow") for node in nodes} == {0}
    # three features are read by a ReLU alone
    assert sum(onnx.helper.get_node_attr_value(node, "signed") == 0 for node in nodes) == 3


@pytest.mark.parametrize("rounding", ["trunc", "floor", "nearest"])
@pytest.mark.parametrize("make", [Residual, Tanhs])
def test_quant_nodes_are_promised_to_compute_every_bit(make: type[nn.Module], rounding: str) -> None:
    pytest.importorskip("qonnx", reason="the extra `qonnx` is not installed")
    plan, shape = (RESIDUAL_PLAN, EXAMPLE) if make is Residual else (TANHS_PLAN, (1, 1, 8, 8))
    compressor = compressed(make(), plan, shape, rounding=rounding, weight_axis="output")
    x = torch.randn(200, *shape[1:], generator=torch.Generator().manual_seed(9))
    given = Inputs.of(x)
    traced, rounds = quant_graph_of(compressor.network, given)
    session = QuantSession(plain_onnx(compressor.network, given, "qonnx").model)
    assert rounds == ""
    with torch.no_grad():
        expected, trained = traced(x)[0], compressor.network(x)
    assert torch.equal(session(x), expected)
    # a bias behind its sum, and a norm as a product and a sum, move few numbers to the next of their grid
    assert (expected != trained).double().mean() < 0.05
    assert ("MultiThreshold" in session.kernels) == (make is Tanhs)


ESPCN_PLAN = Plan(
    (
        *(Site(path, "weight", prune=True, quantize=True) for path in ("conv1", "conv2", "conv3")),
        *(Site(path, "feature", quantize=True) for path in (INPUT, "tanh1", "tanh2")),
    )
)


@pytest.mark.parametrize(
    ("make", "plan", "shape", "axis", "feature_bits"),
    [
        (Residual, RESIDUAL_PLAN, EXAMPLE, "output", (8, 7, 7, 8)),
        (ESPCN, ESPCN_PLAN, (1, 1, 9, 9), "authors", (8, 32, 32)),
    ],
)
def test_bit_operations_of_a_file_are_those_of_qonnx(
    make: type[nn.Module], plan: Plan, shape: tuple[int, ...], axis: str, feature_bits: tuple[int, ...]
) -> None:
    """They differ where the file has other bits than training: a grid that only a ReLU reads has one bit less, and
    weights with a scale per input channel have the bits that the finest scale needs. qonnx takes what MultiThreshold
    made for floats of 32 bits. It discounts zeros of weights, and neither masks of features nor padding.
    """
    tool = pytest.importorskip("qonnx.util.inference_cost", reason="the extra `qonnx` is not installed")
    from qonnx.core.modelwrapper import ModelWrapper

    network, x = compressed(make(), plan, shape, weight_axis=axis).network, torch.zeros(2, *shape[1:])
    model = plain_onnx(network, Inputs.of(x), "qonnx").model
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = len(x)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    dense, sparse = (
        tool.inference_cost(ModelWrapper(model), discount_sparsity=zeros, cost_breakdown=True)["node_cost"].values()
        for zeros in (False, True)
    )
    weights, layers = quantized_weights(network), qprune.cost(network, x).layers
    for layer, bits, whole, kept in zip(layers, feature_bits, dense, sparse, strict=True):
        weight_bits = weights[layer.name].on_one_grid.bits if axis == "authors" else 8
        assert (layer.feature_bits, layer.weight_bits) == (8, 8)
        assert (layer.macs, layer.macs * bits * weight_bits) == (whole["total_macs"], whole["total_bops"])
        assert layer.effective_macs <= kept["total_macs"] <= layer.macs
        assert layer.weight_bytes * weight_bits == kept["total_mem_w_bits"]


class Functions(nn.Module):
    """Functions before a grid, in all roundings; `wide`: computed in float64."""

    def __init__(self, wide: bool = False) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: Tensor) -> list[Tensor]:
        made = []
        for function in (torch.tanh, torch.sigmoid):
            for bits, rounding in itertools.product((4, 7), ("trunc", "floor", "nearest")):
                y = function(x.double()).float() if self.wide else function(x)
                made.append(torch.ops.qprune.grid(y, bits, 5, rounding, ""))
        return made


def test_thresholds_are_the_function_to_the_last_float() -> None:
    traced = trace(Functions(), Inputs.of(torch.zeros(2, 4)))
    assert rewrite(traced) == ""
    kept = [node for node in traced.graph.nodes if node.op == "get_attr"]
    begins = torch.cat([getattr(traced, node.target).flatten() for node in kept])
    near = [begins, begins.nextafter(torch.tensor(-9.0)), begins.nextafter(torch.tensor(9.0))]
    x = torch.cat([*near, torch.linspace(-20, 20, 4000), torch.tensor([-torch.inf, torch.inf, 3e38])])
    for found, expected in zip(traced(x), Functions(wide=True)(x), strict=True):
        assert torch.equal(found, expected)


def test_what_may_round_otherwise_elsewhere_is_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3))
    plan = Plan((Site("0", "weight", quantize=True), Site(INPUT, "feature", quantize=True)))
    compressor = compressed(network, plan, EXAMPLE, prune=None)
    _, rounds = quant_graph_of(compressor.network, Inputs.of(X))
    assert rounds == "gelu is not known to be exact in float32, so runtimes may round it differently"


class Sum(nn.Module):
    """x + alpha * x, which a CPU computes in one rounding and ONNX in two."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, x.relu(), alpha=self.alpha)


@pytest.mark.parametrize(
    ("layer", "exact"),
    [
        (Sum(1.0), True),
        (Sum(0.3), False),
        (nn.AvgPool2d(2), True),
        (nn.AvgPool2d(2, divisor_override=3), False),
        (nn.AvgPool2d(4, 2, padding=1, count_include_pad=False), False),
        (nn.AdaptiveAvgPool2d(1), True),
        (nn.AdaptiveAvgPool2d(3), False),  # windows of 9, 12 and 16 of 64 values
    ],
    ids=str,
)
def test_equality_is_promised_of_sums_and_of_averages_by_a_power_of_two(layer: nn.Module, exact: bool) -> None:
    plan = Plan(tuple(Site(path, kind, quantize=True) for path, kind in [(INPUT, "feature"), ("0", "feature")]))
    network = nn.Sequential(nn.Identity(), layer)
    compressor = compressed(network, plan, EXAMPLE, prune=None)
    _, rounds = quant_graph_of(compressor.network, Inputs.of(X))
    assert (rounds == "") == exact
    assert exact or rounds.endswith("is not known to be exact in float32, so runtimes may round it differently")


def test_quantize_linear_computes_the_network_at_any_batch(tmp_path: Path) -> None:
    compressor, path = residual("nearest", "output"), tmp_path / "network.onnx"
    qprune.export_onnx(compressor.network, X, path, form="qdq")
    for x in (X, X[:1], torch.cat([X, X])):
        assert qprune.verify_onnx(compressor.network, path, x).differing == 0
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")) == (5, 9)


@pytest.mark.parametrize("form", ["qdq", "integers"])
def test_an_average_with_buffers_is_written_with_the_fraction_bits_of_the_end(form: str, tmp_path: Path) -> None:
    """Averages of d that begin before the event lie between 0 and d: 5 becomes 2.9."""
    torch.manual_seed(5)
    schedule = qprune.Schedule(t_p=0, dt_p=1, n=1, t_qw=2, t_qf=2)
    compressor = qprune.compress(Residual(), X, schedule, 1, len(X), plan=RESIDUAL_PLAN)
    average = AveragedModel(compressor.network, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for step in range(12):
        compressor.at(step)
        compressor.network.train()(X)
        average.update_parameters(compressor.network)
    averaged = average.module.eval()
    if form == "qdq":
        qprune.export_onnx(averaged, X, tmp_path / "average.onnx", form="qdq")
        assert qprune.verify_onnx(averaged, tmp_path / "average.onnx", X).differing == 0
        return
    export_integers(averaged, X, tmp_path / "average.npz")
    with np.load(tmp_path / "average.npz") as archive, torch.no_grad():
        expected = qprune.convert(averaged)(X).numpy()
        np.testing.assert_allclose(computed(archive, X.double().numpy()), expected, rtol=0, atol=1e-5)


def test_types_of_fixed_point() -> None:
    assert fixed_type(8, 5) == "fixed<8,3>"
    assert fixed_type(4, [6, -1]) == ["fixed<4,-2>", "fixed<4,5>"]


Array = NDArray[Any]


def conv2d(x: Array, w: Array, stride: list[int], padding: list[int], groups: int) -> Array:
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3))[:, :, :: stride[0], :: stride[1]]
    parts = zip(np.split(windows, groups, 1), np.split(w, groups, 0), strict=True)
    return np.concatenate([np.einsum("ncijkl,ockl->noij", part, weight) for part, weight in parts], 1)


def computed(archive: Any, x: Array) -> Array:
    """Compute a network from its archive in numpy alone."""
    description = json.loads(str(archive["network"]))
    results: dict[str, Any] = {description["inputs"][0]: x}

    def value(given: Any) -> Any:
        if isinstance(given, dict):
            return results[given["node"]] if "node" in given else archive[given["tensor"]]
        return [value(each) for each in given] if isinstance(given, list) else given

    def rounded(x: Array, bits: int, decimal: int, rounding: str, **_: Any) -> Array:
        whole = np.clip(x * 2.0**decimal, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return {"trunc": np.trunc, "floor": np.floor, "nearest": np.round}[rounding](whole) * 2.0**-decimal

    def weight(integers: Array, decimal: list[int], axis: int, bits: int) -> Array:
        assert np.abs(integers.astype(int)).max() <= 2 ** (bits - 1)
        return integers * np.exp2(-np.array(decimal)).reshape([-1 if d == axis else 1 for d in range(integers.ndim)])

    def norm(x: Array, given: dict[str, Any]) -> Array:
        scale = given["weight"].astype(np.float64) / np.sqrt(given["running_var"].astype(np.float64) + given["eps"])
        return x * scale[:, None, None] + (given["bias"] - given["running_mean"] * scale)[:, None, None]

    known: dict[str, Any] = {
        "sym_size": lambda x, a: x.shape[a["dim"]],
        "mask": lambda x, a: x * a["kept"],
        "conv2d": lambda x, a: conv2d(x, a["weight"], a["stride"], a["padding"], a["groups"]),
        "batch_norm": norm,
        "relu": lambda x, a: np.maximum(x, 0),
        "add": lambda x, a: x + a["other"],
        "avg_pool2d": lambda x, a: x.mean((2, 3), keepdims=True),
        "view": lambda x, a: x.reshape(a["size"]),
        "linear": lambda x, a: x @ a["weight"].T + a["bias"],
        "grid": lambda x, a: rounded(x, **a),
        "weight": lambda x, a: weight(x, **a),
    }
    for step in description["operations"]:
        first, *rest = (value(argument) for argument in step["arguments"].values())
        given = dict(zip(list(step["arguments"])[1:], rest, strict=True))
        results[step["name"]] = known[step["operation"]](first, given)
    [output] = description["outputs"]
    return results[output["node"]]


def test_the_network_is_computed_from_whole_numbers_in_numpy_alone(tmp_path: Path) -> None:
    compressor, path = residual("nearest", "authors"), tmp_path / "network.npz"
    export_integers(compressor.network, X, path)
    with np.load(path) as archive:
        found = computed(archive, X.double().numpy())
        weights = [archive[name] for name in archive if name.endswith("original")]
        steps = {step["name"]: step for step in json.loads(str(archive["network"]))["operations"]}
    with torch.no_grad():
        np.testing.assert_allclose(found, compressor.network(X).numpy(), rtol=0, atol=1e-5)
    assert {weight.dtype for weight in weights} == {np.dtype("int8")}
    assert steps["grid_4"]["type"] == f"fixed<8,{8 - steps['grid_4']['arguments']['decimal']}>"


def test_a_missing_qonnx_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qprune.export.verification.find_spec", lambda name: None)
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    plan = Plan((Site("0", "weight", quantize=True), Site(INPUT, "feature", quantize=True)))
    compressor = compressed(network, plan, EXAMPLE, prune=None)
    qprune.export_onnx(compressor.network, X, tmp_path / "network.onnx", form="qonnx")
    with pytest.raises(qprune.UserError, match=r"^qonnx is not installed; type: pip install 'qprune\[qonnx\]'$"):
        qprune.verify_onnx(compressor.network, tmp_path / "network.onnx", X)
