"""What an integer program computes with, as custom operators of torch, and the ONNX nodes of each.

A feature in integers is uint8: n + zero for n * 2^-decimal, with a zero point of 0 where nothing is negative, else 128.
ONNX has it between QuantizeLinear and DequantizeLinear, which onnxruntime fuses to integer kernels; the operators
compute in PyTorch what those kernels compute, to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto, numpy_helper
from onnxscript import opset19 as op
from torch import Tensor


@torch.library.custom_op("qprune::quantize", mutates_args=())
def quantize(x: Tensor, decimal: int, low: int, high: int, zero: int) -> Tensor:
    """Return float32 as uint8: nearest, ties to even."""
    return ((x * 2.0**decimal).round().clamp(low, high) + zero).to(torch.uint8)


@torch.library.custom_op("qprune::dequantize", mutates_args=())
def dequantize(x: Tensor, decimal: int, zero: int) -> Tensor:
    """Return uint8 as float32."""
    return (x.float() - zero) * 2.0**-decimal


@torch.library.custom_op("qprune::clip", mutates_args=())
def clip(x: Tensor, low: int, high: int) -> Tensor:
    """Return uint8 between two bounds."""
    return x.clamp(low, high)


@torch.library.custom_op("qprune::integer_layer", mutates_args=())
def integer_layer(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, window: list[int], grids: list[int]
) -> Tensor:
    """Return a convolution or a linear layer on uint8 as uint8, round((sums + bias) * factor), or as float32.

    Args:
        x: uint8, (B, C, ...).
        weight: int8, (O, ...), its norm folded into scale and bias.
        scale: float32, (O,), of the weight; may be negative.
        bias: int32, (O,), in units of the input's step times `scale`.
        window: Strides, paddings, dilations and number of groups of a convolution; empty for a linear layer.
        grids: decimal and zero point of x; decimal, lowest and highest integer and zero point of the result, if it is
            no float32.
    """
    source, target = grids[:2], grids[2:]
    largest = int(weight.int().flatten(1).abs().sum(1).max()) * 255
    wide = torch.float32 if largest < 2**24 else torch.float64
    sums = _layer(x.to(wide) - source[1], weight.to(wide), window).double()
    by_channel = (-1, *[1] * (sums.dim() - 2))
    # onnxruntime's order: one float32 factor from three scales, of which two are powers of two
    factor = scale * 2.0 ** (target[0] - source[0] if target else -source[0])
    real = (sums + bias.double().view(by_channel)).float() * factor.view(by_channel)
    return quantize(real, 0, *target[1:]) if target else real


def _layer(x: Tensor, weight: Tensor, window: list[int]) -> Tensor:
    if not window:
        return torch.nn.functional.linear(x, weight)
    places, groups = np.array_split(window[:-1], 3), window[-1]
    stride, padding, dilation = (part.tolist() for part in places)
    return torch.convolution(x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups)


def _fake_layer(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, window: list[int], grids: list[int]) -> Tensor:
    return _layer(x.float(), weight.float(), window).to(torch.uint8 if grids[2:] else torch.float32)


quantize.register_fake(lambda x, decimal, low, high, zero: torch.empty_like(x, dtype=torch.uint8))
dequantize.register_fake(lambda x, decimal, zero: torch.empty_like(x, dtype=torch.float32))
clip.register_fake(lambda x, low, high: torch.empty_like(x))
integer_layer.register_fake(_fake_layer)


def constant(value: Any, dtype: str = "float32") -> Any:
    """Return an ONNX constant of a numpy type."""
    return op.Constant(value=numpy_helper.from_array(np.asarray(value, dtype)))


def _write_clip(x: Any, low: int, high: int) -> Any:
    x = op.Max(x, constant(low, "uint8")) if low > 0 else x
    return op.Min(x, constant(high, "uint8")) if high < 255 else x


def _write_quantize(x: Any, decimal: int, low: int, high: int, zero: int) -> Any:
    return _write_clip(op.QuantizeLinear(x, constant(2.0**-decimal), constant(zero, "uint8")), low + zero, high + zero)


def _write_dequantize(x: Any, decimal: int, zero: int) -> Any:
    return op.DequantizeLinear(x, constant(2.0**-decimal), constant(zero, "uint8"))


def _write_layer(x: Any, weight: Any, scale: Any, bias: Any, window: list[int], grids: list[int]) -> Any:
    source, target = grids[:2], grids[2:]
    zeros, step = np.zeros(scale.shape[0]), op.Mul(scale, constant(2.0 ** -source[0]))
    inputs = [
        _write_dequantize(x, *source),
        op.DequantizeLinear(weight, scale, constant(zeros, "int8"), axis=0),
        op.DequantizeLinear(bias, step, constant(zeros, "int32"), axis=0),
    ]
    if window:
        stride, padding, dilation = (part.tolist() for part in np.array_split(window[:-1], 3))
        real = op.Conv(*inputs, strides=stride, pads=padding * 2, dilations=dilation, group=window[-1])
    else:
        real = op.Gemm(*inputs, transB=1)
    return _write_quantize(real, *target) if target else real


def write_weight(integers: Any, decimal: list[int], axis: int, bits: int) -> Any:
    """Write a weight as stored integers that the runtime unpacks when it loads the file."""
    return op.Mul(op.Cast(integers, to=TensorProto.FLOAT), constant(step_of(integers, decimal, axis)))


def step_of(weight: Any, decimal: list[int], axis: int) -> Any:
    """Return 2^-decimal, shaped to broadcast with a weight."""
    return np.exp2(-np.array(decimal)).reshape([-1 if dim == axis else 1 for dim in range(len(weight.shape))])


def _write_average(
    x: Any, kernel: list[int], stride: Any = (), padding: Any = (0, 0), ceil_mode: bool = False, *counted: Any
) -> Any:
    """Write an average with its `divisor_override`, which torch's own translation drops."""
    include, divisor = counted[0] if counted else True, counted[1] if len(counted) > 1 else None
    places: dict[str, Any] = {"kernel_shape": kernel, "strides": list(stride or kernel), "pads": [*padding, *padding]}
    mean = op.AveragePool(x, ceil_mode=int(ceil_mode), count_include_pad=int(include or bool(divisor)), **places)
    return op.Mul(mean, constant(kernel[0] * kernel[1] / divisor)) if divisor else mean


TRANSLATIONS = {
    torch.ops.aten.avg_pool2d.default: _write_average,
    torch.ops.qprune.quantize.default: _write_quantize,
    torch.ops.qprune.dequantize.default: _write_dequantize,
    torch.ops.qprune.clip.default: _write_clip,
    torch.ops.qprune.integer_layer.default: _write_layer,
}
