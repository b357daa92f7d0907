"""Constants packed in a file come back whole when it is loaded, and weights are read as the CPU needs them."""

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from qprune.export import packing
from qprune.export.packing import pack
from qprune.export.verification import Session

MADE = np.random.default_rng(0)


def model_of(array: NDArray[np.generic]) -> onnx.ModelProto:
    """A model that adds a constant to its input."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name in ("input", "output")]
    nodes = [
        helper.make_node("Cast", ["constant"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["input", "cast"], ["output"]),
    ]
    graph = helper.make_graph(nodes, "test", ends[:1], ends[1:], [numpy_helper.from_array(array, "constant")])
    assert kind
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def halved(shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Bytes of which half are zero."""
    kept = MADE.permutation(np.arange(np.prod(shape)) % 2).reshape(shape)
    return (MADE.integers(-128, 128, shape) * kept).astype(np.int8)


@pytest.mark.parametrize(
    ("array", "stored"),
    [
        (halved((80, 64)), 5 / 8),  # a bit for each byte, and half of the bytes
        (halved((31, 31, 3, 3)), 5 / 8),  # no whole number of bytes of flags
        (MADE.integers(-8, 8, (80, 64)).astype(np.int8), 1 / 2),
        (np.where(MADE.random((80, 64)) > 0.5, 140, 128).astype(np.uint8), 1 / 8),
        ((MADE.random((80, 64)) > 0.5).astype(np.float32), 1 / 8),
        (np.full((64, 64), 100, np.int8), 1),
        (MADE.random((16, 64), np.float32), 4),
    ],
)
def test_constants_are_stored_tightly_and_come_back(array: NDArray[np.generic], stored: float) -> None:
    model = model_of(array)
    pack(model)
    onnx.checker.check_model(model)
    size = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    assert array.size * stored <= size <= array.size * stored + 400
    session = Session(model.SerializeToString())
    found = session.session.run(None, {"input": np.zeros(array.shape, np.float32)})[0]
    np.testing.assert_array_equal(found, array.astype(np.float32))
    assert session.kernels == {"Add": 1}  # all else was carried out when the file was loaded


def test_the_cpu_that_loads_a_file_decides_whether_weights_are_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that saturates finds another sum than the largest; here the file asks for one that no CPU finds."""
    for largest, kept in ((packing.LARGEST_SUM, "int8"), (0, "uint8")):
        monkeypatch.setattr(packing, "LARGEST_SUM", largest)
        array = MADE.integers(-128, 128, (8, 8)).astype(np.int8)
        model = model_of(array)
        model.graph.initializer.append(numpy_helper.from_array(np.full(8, 0.5, np.float32), "scale"))
        model.graph.node[0].CopyFrom(helper.make_node("DequantizeLinear", ["constant", "scale"], ["cast"], axis=0))
        pack(model, {"constant"})
        assert [node.op_type for node in model.graph.node].count("If") == 1
        [found] = onnxruntime.InferenceSession(model.SerializeToString()).run(
            None, {"input": np.zeros((8, 8), np.float32)}
        )
        np.testing.assert_array_equal(found, array / np.float32(2))
        assert Session(model.SerializeToString()).kernels["If"] == 0, kept
