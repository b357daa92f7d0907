"""A network as a list of steps that run in PyTorch and write ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qprune.compression.functional import integer_range
from qprune.export.onnx_graph import GraphBuilder

BYTES = {"uint8": 1, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class FixedPoint:
    """The numbers n * 2^-decimal for whole n from low to high."""

    decimal: int
    low: int
    high: int

    @classmethod
    def signed(cls, bits: int, decimal: int) -> FixedPoint:
        """Return the grid of Eq. 1 for N = `bits` and d = `decimal`."""
        return cls(decimal, *integer_range(bits))

    @property
    def scale(self) -> float:
        """The step between two numbers."""
        return 2.0**-self.decimal

    @property
    def largest(self) -> int:
        """The largest |n|."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Value:
    """A tensor between two steps.

    dtype: `float32`, `float64` or `uint8`, which is float32 in PyTorch and n + zero_point, for n * grid.scale, in ONNX.
    shape: at the example input. grid: where every element lies; None for arbitrary floats.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    grid: FixedPoint | None = None
    zero_point: int = 0

    @property
    def on_grid(self) -> FixedPoint:
        """The grid of a value that has one."""
        assert self.grid is not None
        return self.grid


@dataclass(frozen=True)
class Step:
    """One operation.

    run: tensors -> tensor. write: (graph, input names) -> output name, adding ONNX nodes.
    """

    run: Callable[..., Tensor]
    write: Callable[..., str]


@dataclass
class Program:
    """Steps in order, with the names of the values that they read and make.

    nodes: the value that each node of the trace became. notes: one row per layer (path, kernel, why) and per grid that
    calibration added. exact: whether ONNX and its reference must agree in every bit.
    """

    source: Value
    steps: list[tuple[Step, tuple[str, ...], str]] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    output: str = ""
    nodes: dict[str, Value] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)
    exact: bool = True

    def add(self, step: Step, inputs: Sequence[Value], output: Value) -> Value:
        """Append a step that makes `output`, and return `output`."""
        self.steps.append((step, tuple(value.name for value in inputs), output.name))
        self.values[output.name] = output
        return output

    def note(self, path: str, kernel: str, why: str = "") -> None:
        """Record how the layer at `path` is computed, and why not in integers."""
        self.notes.append({"path": path, "kernel": kernel, "why": why})

    def __call__(self, x: Tensor) -> Tensor:
        """Run the steps in PyTorch on x (B, ...)."""
        return self.run(x)[self.output]

    @torch.no_grad()
    def run(self, x: Tensor, keep: Sequence[str] = ()) -> dict[str, Tensor]:
        """Run the steps in PyTorch; return the output and the values named in `keep`."""
        tensors, kept, last = {self.source.name: x}, {*keep, self.output}, self._last_reads()
        for index, (step, inputs, output) in enumerate(self.steps):
            tensors[output] = step.run(*(tensors[name] for name in inputs))
            for name in set(inputs) - kept:
                if last[name] == index:
                    del tensors[name]
        return tensors

    def peak_activation_bytes(self) -> int:
        """Return the largest sum of values alive at once, for one sample.

        Weights and the kernels' workspace are not counted, and fusion by the runtime is not considered.
        """
        size = {name: BYTES[v.dtype] * torch.Size(v.shape[1:]).numel() for name, v in self.values.items()}
        last = self._last_reads()
        alive, peak = {self.source.name}, 0
        for index, (_, inputs, output) in enumerate(self.steps):
            alive.add(output)
            peak = max(peak, sum(size[name] for name in alive))
            alive -= {name for name in inputs if last[name] == index and name != self.output}
        return peak

    def onnx_bytes(self, dynamic_size: bool, metadata: Mapping[str, str]) -> bytes:
        """Return the ONNX model, of any batch size, and any size if `dynamic_size`."""
        graph, names = GraphBuilder(), {self.source.name: "input"}
        for step, inputs, output in self.steps:
            names[output] = step.write(graph, *(names[name] for name in inputs))
        graph.node("Identity", names[self.output], output="output")
        shapes: list[list[int | str]] = []
        for prefix, value in (("", self.source), ("out_", self.values[self.output])):
            sizes: list[int | str] = list(value.shape[1:])
            if dynamic_size and len(sizes) == 3:
                sizes[1:] = [f"{prefix}height", f"{prefix}width"]
            shapes.append(["batch", *sizes])
        content: bytes = graph.model(shapes[0], shapes[1], metadata).SerializeToString()
        return content

    def _last_reads(self) -> dict[str, int]:
        return {name: index for index, (_, inputs, _output) in enumerate(self.steps) for name in inputs}
