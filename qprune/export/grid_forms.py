"""What grids, masks and weights become in files that hold them as nodes: QuantizeLinear pairs, or QONNX's Quant.

Quant (domain `qonnx.custom_op.general`) clamps and then rounds, as Eq. 1: scale 2^-d, zero point 0, N bits.
MultiThreshold counts the thresholds at or below its input, and adds `out_bias`.
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

from qprune.export import quant_graph  # noqa: F401  (its operators)
from qprune.export.integer_kernels import TRANSLATIONS, constant, step_of

QONNX_DOMAIN = "qonnx.custom_op.general"
ROUNDING_MODES = {"trunc": "DOWN", "floor": "FLOOR", "nearest": "ROUND"}


def _operator(name: str, inputs: str, **attributes: OpSchema.AttrType) -> Op:
    """Return an operator of QONNX on float32."""
    schema = OpSchema(
        name,
        QONNX_DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(each, "T") for each in inputs.split()],
        outputs=[OpSchema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(key, kind) for key, kind in attributes.items()],
    )
    return Op(Opset(QONNX_DOMAIN, 1), name, schema)


_INT, _TEXT, _FLOAT = OpSchema.AttrType.INT, OpSchema.AttrType.STRING, OpSchema.AttrType.FLOAT
_quant = _operator("Quant", "x scale zeropt bitwidth", signed=_INT, narrow=_INT, rounding_mode=_TEXT)
_multi_threshold = _operator("MultiThreshold", "x thresholds", out_dtype=_TEXT, out_bias=_FLOAT)


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


def _thresholds(x: Any, begins: Any, bits: int, decimal: int, lowest: int) -> Any:
    numbers = _multi_threshold(x, begins, out_dtype=f"INT{bits}", out_bias=float(lowest))
    return op.Mul(numbers, constant(2.0**-decimal))


def _dequantized_weight(integers: Any, decimal: list[int], axis: int, bits: int) -> Any:
    steps = constant(np.exp2(-np.array(decimal, np.float64)) if axis >= 0 else 2.0 ** -decimal[0])
    zeros = constant(np.zeros(len(decimal)) if axis >= 0 else 0, "int8" if bits <= 8 else "int16")
    return (op if bits <= 8 else opset21).DequantizeLinear(integers, steps, zeros, axis=max(axis, 0))


def _mask(x: Any, kept: Any, site: str) -> Any:
    return op.Mul(x, kept)


_ops = torch.ops.qprune
QDQ = {**TRANSLATIONS, _ops.grid.default: _pair, _ops.mask.default: _mask, _ops.weight.default: _dequantized_weight}
QONNX = {
    **QDQ,
    _ops.grid.default: _quant_feature,
    _ops.thresholds.default: _thresholds,
    _ops.weight.default: _quant_weight,
}
