"""Build an ONNX graph with integer constants packed as tightly as ONNX allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qprune import __version__

OPSET, IR_VERSION = 21, 10  # the first opset with 4-bit integers, and the file format that came with it
TYPES = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "uint8": TensorProto.UINT8}
UINT8_OFFSET = 128  # from int8 to uint8
UNPACKING_BYTES = 1024  # about the size of the nodes that restore the zeros of a weight
LARGEST_SUM = 4 * 255 * 127  # of four products of a uint8 and an int8


class GraphBuilder:
    """Nodes and initializers of one graph. Equal constants are stored once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0
        self._exact_sums = ""

    def _name(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        name = output or self._name("v")
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: str | None = None) -> str:
        """Return the name of an initializer of numpy type `dtype` (default: its own)."""
        array: NDArray[Any] = np.asarray(value)
        array = np.ascontiguousarray(array if dtype is None else array.astype(dtype)).reshape(array.shape)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._name("c")
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def ints(self, values: Any) -> str:
        """Return a constant vector for a shape or axes."""
        return self.constant(np.atleast_1d(values), "int64")

    def integers(self, value: Tensor, bits: int, dtype: int) -> str:
        """Return integers as ONNX type `dtype` (FLOAT, INT8), stored in 4, 8 or 16 bits."""
        if bits <= 4:
            stored = self._name("w")
            flat = value.flatten().tolist()
            self.initializers.append(helper.make_tensor(stored, TensorProto.INT4, list(value.shape), flat))
        elif bits <= 8:
            stored = self.bytes(value, "int8")
            if dtype == TensorProto.INT8:
                return stored
        else:
            stored = self.constant(value, "int16")
        return self.node("Cast", stored, to=dtype)

    def bytes(self, value: Tensor, dtype: str, zero_point: int = 0) -> str:
        """Return a weight in bytes, stored without its zeros where that is smaller.

        Then the file has one bit per element and the bytes that are not `zero_point`. The nodes that put them together
        read constants only, so the runtime folds them when it loads the file.
        """
        flat = np.asarray(value).astype(dtype).ravel()
        kept = flat != zero_point
        if flat.size <= -(-flat.size // 8) + int(kept.sum()) + UNPACKING_BYTES:
            return self.constant(value, dtype)
        bits = self.node("Cast", self._unpacked_bits(kept), to=TensorProto.INT32)
        place = self.node("CumSum", bits, self.constant(0, "int64"))  # of each kept element in `values`, from 1 on
        values = self.constant(np.concatenate([np.asarray([zero_point], dtype), flat[kept]]))
        return self.node("Reshape", self.node("Gather", values, self.node("Mul", bits, place)), self.ints(value.shape))

    def mask(self, mask: Tensor) -> str:
        """Return a mask of 0 and 1 as uint8, stored as one bit per entry."""
        return self.node("Reshape", self._unpacked_bits(np.asarray(mask).ravel() != 0), self.ints(mask.shape))

    def _unpacked_bits(self, flags: NDArray[Any]) -> str:
        columns = self.node("Unsqueeze", self.constant(np.packbits(flags)), self.constant([1], "int64"))
        shifted = self.node("BitShift", columns, self.constant(np.arange(7, -1, -1), "uint8"), direction="RIGHT")
        flat = self.node("Reshape", self.node("BitwiseAnd", shifted, self.constant(1, "uint8")), self.ints([-1]))
        if flags.size % 8:
            flat = self.node("Slice", flat, self.constant([0], "int64"), self.constant([flags.size], "int64"))
        return flat

    def as_unsigned(self, signed: str) -> str:
        """Convert int8 to uint8 by adding 128."""
        wide = self.node("Cast", signed, to=TensorProto.INT32)
        return self.node("Cast", self.node("Add", wide, self.constant(UINT8_OFFSET, "int32")), to=TensorProto.UINT8)

    def exact_int8_sums(self) -> str:
        """Return a bool: whether the CPU adds uint8 x int8 without saturating.

        The runtime evaluates it when it loads the file, on two constant matrices with the largest products there are.
        """
        if not self._exact_sums:
            factors = self.constant(np.full((2, 4), 255, "uint8")), self.constant(np.full((4, 2), 127, "int8"))
            smallest = self.node("ReduceMin", self.node("MatMulInteger", *factors), keepdims=0)
            self._exact_sums = self.node("Equal", smallest, self.constant(LARGEST_SUM, "int32"))
        return self._exact_sums

    def either(
        self, condition: str, branches: tuple[Callable[[], str], Callable[[], str]], dtype: int, shape: Any
    ) -> str:
        """Add an If. branches: write the value (ONNX type `dtype`) for true and for false.

        Initializers belong to the outer graph, so both branches share them. The runtime keeps one branch when it loads
        the file if the condition folds into a constant.
        """
        subgraphs = {}
        for name, write in zip(("then_branch", "else_branch"), branches, strict=True):
            outer, self.nodes = self.nodes, []
            result = [helper.make_tensor_value_info(write(), dtype, shape)]
            subgraphs[name] = helper.make_graph(self.nodes, name, [], result)
            self.nodes = outer
        return self.node("If", condition, **subgraphs)

    def model(
        self, input_shape: list[int | str], output_shape: list[int | str], metadata: Mapping[str, str]
    ) -> onnx.ModelProto:
        """Return the checked model from `input` to `output`, both float32."""
        ends = (("input", input_shape), ("output", output_shape))
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends]
        graph = helper.make_graph(self.nodes, "qprune", values[:1], values[1:], self.initializers)
        model = helper.make_model(
            graph,
            producer_name="qprune",
            producer_version=__version__,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model)
        return model
