"""Weights kept without their zeros come back whole, once, and the layers on them stay integer kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
import onnx

from qprune.export import onnx_graph
from qprune.export.integer_lowering import calibrate, integer_program
from qprune.export.onnx_graph import GraphBuilder
from qprune.export.trace import trace
from qprune.export.verification import Session
from tests.export.networks import RESIDUAL_PLAN, Residual, compressed


def laid_out(graph: GraphBuilder, name: str, size: int) -> Session:
    """A model that adds the weight `name`, flat, to its input (batch, size)."""
    flat = graph.node("Reshape", name, graph.ints([1, size]))
    graph.node("Add", "input", graph.node("Cast", flat, to=onnx_graph.TYPES["float32"]), output="output")
    shape: list[int | str] = ["batch", size]
    return Session(graph.model(shape, shape, {}).SerializeToString())


@pytest.mark.parametrize(("kind", "zero"), [("int8", 0), ("uint8", 128)])
@pytest.mark.parametrize("shape", [(80, 64), (31, 31, 3, 3)])  # the second has no whole number of bytes of flags
def test_half_a_weight_of_zeros_takes_five_eighths_and_comes_back(kind: str, zero: int, shape: tuple[int, ...]) -> None:
    made = np.random.default_rng(0)
    zeros = made.permutation(np.arange(np.prod(shape)) % 2).reshape(shape)
    value = torch.from_numpy(made.integers(-128, 128, shape) * zeros)
    graph = GraphBuilder()
    name = graph.bytes(value + zero, kind, zero)
    stored = sum(len(tensor.raw_data) for tensor in graph.initializers)
    assert stored <= value.numel() * 5 / 8 + 100
    session = laid_out(graph, name, value.numel())
    assert torch.equal(session(torch.zeros(2, value.numel())), (value + zero).float().reshape(1, -1).expand(2, -1))
    assert session.kernels == {"Add": 1}  # all else was carried out when the file was loaded


def test_a_weight_that_would_not_become_smaller_is_kept_as_it_is() -> None:
    for value in (torch.ones(100, 100), torch.zeros(16, 64)):
        graph = GraphBuilder()
        graph.bytes(value, "int8")
        assert [tensor.dims[:] for tensor in graph.initializers] == [list(value.shape)]
        assert not graph.nodes


@pytest.mark.parametrize("weights", ["auto", "safe", "signed"])
def test_layers_on_such_weights_are_equal_to_pytorch_in_integer_kernels(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = compressed(Residual(), RESIDUAL_PLAN, (1, 3, 8, 8), rounding="nearest", weight_axis="output")
    steps = trace(compressor.network, torch.zeros(1, 3, 8, 8))
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    program = integer_program(steps, False, calibrate(steps, x), weights)
    monkeypatch.setattr(onnx_graph, "UNPACKING_BYTES", -1000)
    model = onnx.load_from_string(program.onnx_bytes(False, {}))
    session = Session(model.SerializeToString())
    assert sum(node.op_type == "CumSum" for node in model.graph.node) == 4
    assert session.kernels["CumSum"] == session.kernels["Gather"] == 0
    assert session.kernels["QLinearConv"] == 3
    assert weights == "signed" or torch.equal(session(x), program(x))
