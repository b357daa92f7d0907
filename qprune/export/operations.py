"""Operations without weights, each in PyTorch and in ONNX, under the names of `tracing.OPERATIONS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qprune.export.writer import Writer


@dataclass
class Apply:
    """Any other operation, by its name in `OPERATIONS` of the trace."""

    op: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    form: str

    def run(self, *inputs: Tensor) -> Tensor:
        return _RUN[self.op](self.arguments, self.tensors, *inputs)

    def write(self, graph: Writer, *inputs: str) -> str:
        return _WRITE[self.op](graph, self, *inputs)


_Arguments = dict[str, Any]


def _pool(a: _Arguments, t: _Arguments, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, a["kernel_size"], a["stride"] or None, a["padding"], a["ceil_mode"], a["count_include_pad"])


def _max_pool(a: _Arguments, t: _Arguments, x: Tensor) -> Tensor:
    return F.max_pool2d(x, a["kernel_size"], a["stride"] or None, a["padding"], a["dilation"], a["ceil_mode"])


def _instance_norm(a: _Arguments, t: _Arguments, x: Tensor) -> Tensor:
    return F.instance_norm(x, weight=t.get("weight"), bias=t.get("bias"), eps=a["eps"])


def _batch_norm(a: _Arguments, t: _Arguments, x: Tensor) -> Tensor:
    return F.batch_norm(x, t["running_mean"], t["running_var"], t.get("weight"), t.get("bias"), eps=a["eps"])


_RUN: dict[str, Callable[..., Tensor]] = {
    "add": lambda a, t, x, y: x + y,
    "adaptive_avg_pool": lambda a, t, x: F.adaptive_avg_pool2d(x, a["output_size"]),
    "avg_pool": _pool,
    "batch_norm": _batch_norm,
    "clip": lambda a, t, x: x.clamp(a["min_val"], a["max_val"]),
    "concat": lambda a, t, *x: torch.cat(x, a["dim"]),
    "flatten": lambda a, t, x: x.flatten(a["start_dim"], a["end_dim"]),
    "instance_norm": _instance_norm,
    "leaky_relu": lambda a, t, x: F.leaky_relu(x, a["negative_slope"]),
    "max_pool": _max_pool,
    "mean": lambda a, t, x: x.mean(a["dim"], a["keepdim"]),
    "pad": lambda a, t, x: F.pad(x, a["pad"], a["mode"], a["value"]),
    "pixel_shuffle": lambda a, t, x: F.pixel_shuffle(x, a["upscale_factor"]),
    "relu": lambda a, t, x: x.relu(),
    "relu6": lambda a, t, x: x.clamp(0, 6),
    "reshape": lambda a, t, x: x.reshape(x.shape[0], *a["size"][1:]),
    "sigmoid": lambda a, t, x: x.sigmoid(),
    "tanh": lambda a, t, x: x.tanh(),
}


def _write_pool(kind: str) -> Callable[..., str]:
    def write(graph: Writer, step: Apply, x: str) -> str:
        a = step.arguments
        further: dict[str, Any] = {"count_include_pad": int(a.get("count_include_pad", 0))}
        if kind == "MaxPool":
            further = {"dilations": _pair(a["dilation"])}
        pads = _pair(a["padding"])
        return graph.node(
            kind,
            x,
            kernel_shape=_pair(a["kernel_size"]),
            strides=_pair(a["stride"] or a["kernel_size"]),
            pads=pads + pads,
            ceil_mode=int(a["ceil_mode"]),
            **further,
        )

    return write


def _pair(value: Any) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values if len(values) == 2 else values * 2


def _write_norm(graph: Writer, step: Apply, x: str) -> str:
    t, channels = step.tensors, step.arguments["channels"]
    scale = t.get("weight", torch.ones(channels))
    shift = t.get("bias", torch.zeros(channels))
    values = [graph.constant(v, "float32") for v in (scale, shift)]
    if step.op == "instance_norm":
        return graph.node("InstanceNormalization", x, *values, epsilon=step.arguments["eps"])
    values += [graph.constant(t[name], "float32") for name in ("running_mean", "running_var")]
    return graph.node("BatchNormalization", x, *values, epsilon=step.arguments["eps"])


def _write_clip(low: str | float, high: str | float) -> Callable[..., str]:
    def write(graph: Writer, step: Apply, x: str) -> str:
        bounds = [step.arguments[b] if isinstance(b, str) else b for b in (low, high)]
        return graph.node("Clip", x, *(graph.constant(float(b), step.form) for b in bounds))

    return write


def _write_leaky(graph: Writer, step: Apply, x: str) -> str:
    slope = step.arguments["negative_slope"]
    if step.form == "float32":
        return graph.node("LeakyRelu", x, alpha=slope)
    scaled = graph.node("Mul", x, graph.constant(slope, step.form))  # onnxruntime has no LeakyRelu of doubles
    return graph.node("Max" if slope <= 1 else "Min", x, scaled)


def _write_pad(graph: Writer, step: Apply, x: str) -> str:
    a, rank = step.arguments, step.arguments["rank"]
    pairs = [a["pad"][i : i + 2] for i in range(0, len(a["pad"]), 2)]  # from the last dimension on
    pairs += [[0, 0]] * (rank - len(pairs))
    pads = [pair[side] for side in (0, 1) for pair in reversed(pairs)]
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}[a["mode"]]
    value = (graph.constant(float(a["value"] or 0), step.form),) if mode == "constant" else ()
    return graph.node("Pad", x, graph.shape(pads), *value, mode=mode)


def _write_mean(graph: Writer, step: Apply, x: str) -> str:
    axes = [step.arguments["dim"]] if isinstance(step.arguments["dim"], int) else list(step.arguments["dim"])
    return graph.node("ReduceMean", x, graph.shape(axes), keepdims=int(step.arguments["keepdim"]))


def _write_reshape(graph: Writer, step: Apply, x: str) -> str:
    return graph.node("Reshape", x, graph.shape([0, *step.arguments["size"][1:]]))


_WRITE: dict[str, Callable[..., str]] = {
    "add": lambda graph, step, x, y: graph.node("Add", x, y),
    "adaptive_avg_pool": lambda graph, step, x: graph.node("ReduceMean", x, graph.shape([2, 3]), keepdims=1),
    "avg_pool": _write_pool("AveragePool"),
    "batch_norm": _write_norm,
    "clip": _write_clip("min_val", "max_val"),
    "concat": lambda graph, step, *x: graph.node("Concat", *x, axis=step.arguments["dim"]),
    "flatten": lambda graph, step, x: graph.node("Flatten", x, axis=1),
    "instance_norm": _write_norm,
    "leaky_relu": _write_leaky,
    "max_pool": _write_pool("MaxPool"),
    "mean": _write_mean,
    "pad": _write_pad,
    "pixel_shuffle": lambda graph, step, x: graph.node(
        "DepthToSpace", x, blocksize=step.arguments["upscale_factor"], mode="CRD"
    ),
    "relu": lambda graph, step, x: graph.node("Relu", x),
    "relu6": _write_clip(0.0, 6.0),
    "reshape": _write_reshape,
    "sigmoid": lambda graph, step, x: graph.node("Sigmoid", x),
    "tanh": lambda graph, step, x: graph.node("Tanh", x),
}
