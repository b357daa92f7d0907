"""Store the constants of an ONNX file tightly, and choose the type of its weights by the CPU that loads it.

The nodes that unpack a constant read constants only, so a runtime carries them out once, when it loads the file.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

# Types of the bytes of a weight: chosen by the CPU that loads the file, uint8, or int8.
WEIGHT_TYPES = ("auto", "safe", "signed")
UINT8_OFFSET = 128  # from int8 to uint8
UNPACKING_BYTES = 1024  # about the size of the nodes that unpack a constant
LARGEST_SUM = 4 * 255 * 127  # of four products of a uint8 and an int8


def pack(model: onnx.ModelProto, unsigned: Container[str] = (), weights: str = "auto") -> None:
    """Pack masks to bits and weights without their zeros, and give weights a type that every CPU adds rightly.

    Args:
        model: Changed in place.
        unsigned: Names of int8 weights that a CPU without VNNI, AMX or ARM's dot products has to read as uint8.
        weights: Their type, one of WEIGHT_TYPES.
    """
    packer = _Packer(model.graph)
    nodes = list(model.graph.node)
    for tensor in model.graph.initializer:
        packer.store(numpy_helper.to_array(tensor), tensor.name)
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in unsigned and weights != "signed":
            packer.read_unsigned(node, weights == "auto")
        else:
            packer.nodes.append(node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(packer.constants)
    model.graph.node.extend(packer.nodes)


class _Packer:
    """Collects the nodes and constants of a graph anew."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.names: dict[str, str] = {}

    def node(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"unpacked_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: str, name: str = "") -> str:
        """Return the name of a constant; equal ones without a name are stored once."""
        array = np.asarray(value, dtype)
        key = name or f"packed {dtype} {array.shape} {array.tobytes().hex()}"
        if key not in self.names:
            self.names[key] = name or f"packed_{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, self.names[key]))
        return self.names[key]

    def store(self, array: Any, name: str) -> None:
        """Store a constant in the smallest form that its values allow."""
        dtype = str(array.dtype)
        values = np.unique(array) if array.size > UNPACKING_BYTES and dtype != "int64" else np.empty(0)
        if len(values) == 2:
            bits = self.node("Cast", self.bits(array == values[1]), to=TensorProto.BOOL)
            self.restore(self.node("Where", bits, *(self.constant(end, dtype) for end in values[::-1])), array, name)
        elif dtype == "int8" and array.ndim > 1 and array.min() >= -8 and array.max() <= 7:
            pairs = np.append(array.ravel(), [0] * (array.size % 2)).astype(np.uint8).reshape(-1, 2) & 15
            stored = (pairs[:, 0] | pairs[:, 1] << 4).tobytes()
            self.constants.append(helper.make_tensor(f"{name}.4", TensorProto.INT4, array.shape, stored, raw=True))
            self.node("Cast", f"{name}.4", to=TensorProto.INT8, output=name)
        elif dtype == "int8" and array.size > -(-array.size // 8) + np.count_nonzero(array) + UNPACKING_BYTES:
            bits = self.node("Cast", self.bits(array != 0), to=TensorProto.INT32)
            place = self.node("CumSum", bits, self.constant(0, "int64"))  # of each kept element in `kept`, from 1 on
            kept = self.constant(np.append(0, array[array != 0]), "int8")
            self.restore(self.node("Gather", kept, self.node("Mul", bits, place)), array, name)
        else:
            self.constant(array, dtype, name)

    def restore(self, flat: str, array: NDArray[Any], name: str) -> None:
        self.node("Reshape", flat, self.constant(array.shape, "int64"), output=name)

    def bits(self, flags: NDArray[Any]) -> str:
        """Return flat flags as uint8, stored as one bit each."""
        columns = self.node("Unsqueeze", self.constant(np.packbits(flags), "uint8"), self.constant([1], "int64"))
        shifts = self.constant(np.arange(7, -1, -1), "uint8")
        one = self.node(
            "BitwiseAnd", self.node("BitShift", columns, shifts, direction="RIGHT"), self.constant(1, "uint8")
        )
        flat = self.node("Reshape", one, self.constant([-1], "int64"))
        return self.node("Slice", flat, self.constant([0], "int64"), self.constant([flags.size], "int64"))

    @cached_property
    def exact_sums(self) -> str:
        """A bool: whether the CPU adds uint8 x int8 without saturating.

        The runtime evaluates it when it loads the file, on two constant matrices with the largest products there are.
        """
        factors = self.constant(np.full((2, 4), 255), "uint8"), self.constant(np.full((4, 2), 127), "int8")
        smallest = self.node("ReduceMin", self.node("MatMulInteger", *factors), keepdims=0)
        return self.node("Equal", smallest, self.constant(LARGEST_SUM, "int32"))

    def read_unsigned(self, node: onnx.NodeProto, chosen: bool) -> None:
        """Dequantize an int8 weight (out, ...) as uint8; if `chosen`, only where the CPU needs it.

        The runtime keeps one branch of the If when it loads the file.
        """
        (weight, scale), [result] = node.input[:2], node.output
        wide, shifted, unsigned = (f"{result}.{name}" for name in ("wide", "shifted", "unsigned"))
        zeros = self.constant(np.full(self.shapes[weight][0], UINT8_OFFSET), "uint8")
        as_uint8 = [
            helper.make_node("Cast", [weight], [wide], to=TensorProto.INT32),
            helper.make_node("Add", [wide, self.constant(UINT8_OFFSET, "int32")], [shifted]),
            helper.make_node("Cast", [shifted], [unsigned], to=TensorProto.UINT8),
            helper.make_node("DequantizeLinear", [unsigned, scale, zeros], [f"{result}.else"], axis=0),
        ]
        if not chosen:
            as_uint8[-1].output[0] = result
            self.nodes += as_uint8
            return
        as_int8 = helper.make_node("DequantizeLinear", node.input, [f"{result}.then"], axis=0)
        branches = {}
        for name, nodes in (("then", [as_int8]), ("else", as_uint8)):
            made = helper.make_tensor_value_info(f"{result}.{name}", TensorProto.FLOAT, self.shapes[weight])
            branches[f"{name}_branch"] = helper.make_graph(nodes, name, [], [made])
        self.node("If", self.exact_sums, output=result, **branches)
