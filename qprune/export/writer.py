"""ONNX nodes and constants, one call each; whole-number constants are packed as narrowly as ONNX can hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qprune import __version__

LAYING_OUT = 1024  # about what the nodes take that lay out a weight kept without its zeros, in bytes
OPSET, IR_VERSION = 21, 10  # the first opset with 4-bit integers, and the file format that came with it
SIGNED_RANGE = 128  # from signed bytes to unsigned ones
_LARGEST_PRODUCTS = (((2, 4), 255, "uint8"), ((4, 2), 127, "int8"))
_LARGEST_SUM = 4 * 255 * 127
TYPES = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "uint8": TensorProto.UINT8}


class Writer:
    """Collects nodes and constants of one graph. Constants that are equal are kept once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.initializers: list[onnx.TensorProto] = []
        self.count = 0
        self._exact = ""

    def new(self, hint: str) -> str:
        """A name that no other value has."""
        self.count += 1
        return f"{hint}{self.count}"

    def node(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node and return its output's name. An input of '' is an optional one that is left out."""
        name = output or self.new("v")
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, kind: str | None = None) -> str:
        """A constant of numpy type `kind` (default: the value's own)."""
        array: NDArray[Any] = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = np.ascontiguousarray(array if kind is None else array.astype(kind)).reshape(np.shape(array))
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = self.new("c")
            self.initializers.append(numpy_helper.from_array(array, self.constants[key]))
        return self.constants[key]

    def integers(self, value: Tensor, bits: int, kind: str) -> str:
        """Whole numbers of `bits` bits as a value of ONNX type `kind` (FLOAT, INT8): 4 bits, 8 or 16 in the file."""
        if bits <= 4:
            packed = self.new("w")
            flat = value.flatten().tolist()
            self.initializers.append(helper.make_tensor(packed, TensorProto.INT4, list(value.shape), flat))
            return self.node("Cast", packed, to=getattr(TensorProto, kind))
        if bits <= 8:
            held = self.bytes(value, "int8")
            return held if kind == "INT8" else self.node("Cast", held, to=getattr(TensorProto, kind))
        return self.node("Cast", self.constant(value, "int16"), to=getattr(TensorProto, kind))

    def bytes(self, value: Tensor, kind: str, zero: int = 0) -> str:
        """A weight as bytes of numpy type `kind`. Where it saves space, as a bit per element and the bytes that are not
        `zero`; the runtime lays them out once, when it loads, and then computes with all of them."""
        flat = numpy_of(value).astype(kind).ravel()
        kept = flat != zero
        if flat.size <= -(-flat.size // 8) + int(kept.sum()) + LAYING_OUT:
            return self.constant(value, kind)
        bits = self.node("Cast", self._bits(kept), to=TensorProto.INT32)
        counted = self.node("CumSum", bits, self.constant(0, "int64"))  # the place of each kept element, from 1 on
        values = self.constant(np.concatenate([np.asarray([zero], kind), flat[kept]]))
        return self.node(
            "Reshape", self.node("Gather", values, self.node("Mul", bits, counted)), self.shape(value.shape)
        )

    def with_offset(self, signed: str) -> str:
        """Signed bytes as unsigned ones, 128 higher; the runtime adds that once, when it loads."""
        higher = self.node("Add", self.node("Cast", signed, to=TensorProto.INT32), self.constant(SIGNED_RANGE, "int32"))
        return self.node("Cast", higher, to=TensorProto.UINT8)

    def adds_bytes_exactly(self) -> str:
        """Whether the CPU that carries out the graph adds products of unsigned and signed bytes without saturating.

        The runtime finds out when it loads: it multiplies two matrices whose products are the largest there are.
        """
        if not self._exact:
            ones = [self.constant(np.full(shape, n, kind)) for shape, n, kind in _LARGEST_PRODUCTS]
            smallest = self.node("ReduceMin", self.node("MatMulInteger", *ones), keepdims=0)
            self._exact = self.node("Equal", smallest, self.constant(_LARGEST_SUM, "int32"))
        return self._exact

    def either(
        self, condition: str, then: Callable[[], str], otherwise: Callable[[], str], kind: int, shape: Any
    ) -> str:
        """One of two values of ONNX type `kind`, which the functions write. Only nodes differ: constants are shared.

        A condition that folds into a constant costs nothing: the runtime keeps the nodes of one side when it loads.
        """
        branches = {}
        for name, write in (("then_branch", then), ("else_branch", otherwise)):
            outer, self.nodes = self.nodes, []
            result = write()
            made = [helper.make_tensor_value_info(result, kind, shape)]
            branches[name] = helper.make_graph(self.nodes, name, [], made)
            self.nodes = outer
        return self.node("If", condition, **branches)

    def mask(self, mask: Tensor) -> str:
        """A mask of 0 and 1 as uint8, kept as one bit per entry; the runtime unpacks it once, when it loads."""
        return self.node("Reshape", self._bits(numpy_of(mask).ravel() != 0), self.shape(mask.shape))

    def _bits(self, flags: NDArray[Any]) -> str:
        """Flags as uint8 of one dimension, kept as one bit each."""
        columns = self.node("Unsqueeze", self.constant(np.packbits(flags)), self.constant([1], "int64"))
        shifted = self.node("BitShift", columns, self.constant(np.arange(7, -1, -1), "uint8"), direction="RIGHT")
        flat = self.node("Reshape", self.node("BitwiseAnd", shifted, self.constant(1, "uint8")), self.shape([-1]))
        if flags.size % 8:
            flat = self.node("Slice", flat, self.constant([0], "int64"), self.constant([flags.size], "int64"))
        return flat

    def shape(self, shape: Any) -> str:
        """A shape, or a list of axes, as a constant."""
        return self.constant(list(shape), "int64")

    def dequantized(self, stored: str, decimal: int, zero: int) -> str:
        """uint8 on the grid 2^-decimal as float32."""
        return self.node(
            "DequantizeLinear", stored, self.constant(2.0**-decimal, "float32"), self.constant(zero, "uint8")
        )

    def quantized(self, real: str, decimal: int, zero: int) -> str:
        """float32 as uint8 on the grid 2^-decimal: nearest, ties to even, saturating."""
        return self.node("QuantizeLinear", real, self.constant(2.0**-decimal, "float32"), self.constant(zero, "uint8"))

    def model(
        self,
        source: tuple[str, list[int | str]],
        result: tuple[str, list[int | str]],
        metadata: Mapping[str, str],
    ) -> onnx.ModelProto:
        """The checked model from its input (name, shape) to its output, both float32."""
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (source, result)]
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


def numpy_of(value: Tensor) -> NDArray[Any]:
    """A tensor's content."""
    array: NDArray[Any] = value.detach().to(torch.device("cpu")).numpy()
    return array
