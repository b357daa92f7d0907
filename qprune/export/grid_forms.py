"""What grids, masks and weights become in files that hold them as nodes: QuantizeLinear pairs, or QONNX's Quant.

Quant (domain `qonnx.custom_op.general`) clamps and then rounds, as Eq. 1: scale 2^-d, zero point 0, N bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from onnx.defs import OpSchema
from onnxscript import opset19 as op
from onnxscript import opset21
from onnxscript.values import Op, Opset
from torch import fx

from qprune.export.integer_kernels import TRANSLATIONS, constant, step_of
from qprune.export.trace import operation

QONNX_DOMAIN = "qonnx.custom_op.general"
ROUNDING_MODES = {"trunc": "DOWN", "floor": "FLOOR", "nearest": "ROUND"}
_SCHEMA = OpSchema(
    "Quant",
    QONNX_DOMAIN,
    1,
    inputs=[OpSchema.FormalParameter(name, "T") for name in ("x", "scale", "zeropt", "bitwidth")],
    outputs=[OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", ["tensor(float)"], "")],
    attributes=[
        OpSchema.Attribute("signed", OpSchema.AttrType.INT),
        OpSchema.Attribute("narrow", OpSchema.AttrType.INT),
        OpSchema.Attribute("rounding_mode", OpSchema.AttrType.STRING),
    ],
)
_quant = Op(Opset(QONNX_DOMAIN, 1), "Quant", _SCHEMA)


def relu_before_grid(traced: fx.GraphModule) -> None:
    """Move a ReLU that alone reads a grid before it: the same numbers, without a sign, in one bit less."""
    for grid in list(traced.graph.nodes):
        readers = list(grid.users)
        if operation(grid) != "grid" or not readers or any(operation(reader) != "relu" for reader in readers):
            continue
        with traced.graph.inserting_before(grid):
            relu = traced.graph.call_function(torch.ops.aten.relu.default, grid.args[:1])
        grid.args = (relu, *grid.args[1:5], False)
        for reader in readers:
            reader.replace_all_uses_with(grid)
            traced.graph.erase_node(reader)
    traced.recompile()


def _quant_feature(x: Any, bits: int, decimal: int, rounding: str, site: str, signed: bool = True) -> Any:
    given = constant(2.0**-decimal), constant(0), constant(bits if signed else bits - 1)
    return _quant(x, *given, signed=int(signed), narrow=0, rounding_mode=ROUNDING_MODES[rounding])


def _quant_weight(values: Any, decimal: list[int], axis: int, bits: int) -> Any:
    """Write a weight, which is on its grid: rounding to nearest keeps it, and every reader takes that mode."""
    step = step_of(values, decimal, axis) if axis >= 0 else 2.0 ** -decimal[0]
    return _quant(values, constant(step), constant(0), constant(bits), signed=1, narrow=0, rounding_mode="ROUND")


def _pair(x: Any, bits: int, decimal: int, rounding: str, site: str, signed: bool = True) -> Any:
    """Write QuantizeLinear, which rounds to nearest and clips to its type, behind what else the grid asks for."""
    low, high = -(2 ** (bits - 1)) * signed, 2 ** (bits - 1) - 1
    step, zero = constant(2.0**-decimal), constant(0, "int8" if bits <= 8 else "int16")
    if rounding != "nearest":
        whole: Any = op.Clip(op.Mul(x, constant(2.0**decimal)), constant(low), constant(high))
        if rounding == "trunc" and signed:  # a cast to an integer truncates
            integers: Any = op.Cast(whole, to=TensorProto.INT32)
            whole = op.Cast(integers, to=TensorProto.FLOAT)
        else:
            whole = op.Floor(whole)
        x = op.Mul(whole, step)
    elif bits not in (8, 16):
        x = op.Clip(x, constant(low * 2.0**-decimal), constant(high * 2.0**-decimal))
    quantizing = op if bits <= 8 else opset21
    return quantizing.DequantizeLinear(quantizing.QuantizeLinear(x, step, zero), step, zero)


def _dequantized_weight(integers: Any, decimal: list[int], axis: int, bits: int) -> Any:
    steps = constant(np.exp2(-np.array(decimal, np.float64)) if axis >= 0 else 2.0 ** -decimal[0])
    zeros = constant(np.zeros(len(decimal)) if axis >= 0 else 0, "int8" if bits <= 8 else "int16")
    return (op if bits <= 8 else opset21).DequantizeLinear(integers, steps, zeros, axis=max(axis, 0))


def _mask(x: Any, kept: Any, site: str) -> Any:
    return op.Mul(x, kept)


_ops = torch.ops.qprune
QDQ = {**TRANSLATIONS, _ops.grid.default: _pair, _ops.mask.default: _mask, _ops.weight.default: _dequantized_weight}
QONNX = {**QDQ, _ops.grid.default: _quant_feature, _ops.weight.default: _quant_weight}
