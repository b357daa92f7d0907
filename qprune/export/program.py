"""A network as steps that PyTorch can carry out and ONNX can hold, one to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx
import torch
from torch import Tensor, nn

from qprune.export.writer import Writer


@dataclass(frozen=True)
class Grid:
    """Numbers n * 2^-decimal, n whole in low..high."""

    decimal: int
    low: int
    high: int

    @property
    def largest(self) -> int:
        """The largest |n|."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True)
class Value:
    """A tensor between steps.

    form: `float32`, `float64`, or `uint8`: n + zero in ONNX, and n as float32 in PyTorch, for the real n * 2^-decimal.
    grid: where every element lies, or None where elements are just floats.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    grid: Grid | None = None
    zero: int = 0


class Step(Protocol):
    """One operation: `run` carries it out on PyTorch's tensors, `write` adds its nodes to an ONNX graph.

    `run(*inputs)` returns the result; `write(graph, *names)` takes and returns the names of values.
    """

    @property
    def run(self) -> Callable[..., Tensor]: ...

    @property
    def write(self) -> Callable[..., str]: ...


@dataclass
class Program:
    """Steps in order, with the names of the values that they read and make.

    nodes: the values that stand for the trace's nodes. notes: a row per layer (path, kernel, why) and per grid that
    export had to add. promise: whether ONNX and PyTorch must agree to the last bit.
    """

    source: Value
    steps: list[tuple[Step, tuple[str, ...], str]] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    output: str = ""
    nodes: dict[str, Value] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)
    promise: bool = True

    def add(self, step: Step, inputs: Sequence[Value], made: Value) -> Value:
        """Append a step that makes `made`."""
        self.steps.append((step, tuple(value.name for value in inputs), made.name))
        self.values[made.name] = made
        return made

    def model(self, dynamic_size: bool, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The ONNX model; batches of any size, and pictures of any size where `dynamic_size`."""
        graph = Writer()
        names = {self.source.name: "input"}
        for step, inputs, made in self.steps:
            names[made] = step.write(graph, *(names[name] for name in inputs))
        graph.node("Identity", names[self.output], output="output")
        return graph.model(
            ("input", _dimensions(self.source.shape, dynamic_size, "")),
            ("output", _dimensions(self.values[self.output].shape, dynamic_size, "out_")),
            metadata,
        )


def _dimensions(shape: tuple[int, ...], dynamic_size: bool, prefix: str) -> list[int | str]:
    inner: list[int | str] = list(shape[1:])
    if dynamic_size and len(shape) == 4:
        inner[1:] = [f"{prefix}height", f"{prefix}width"]
    return ["batch", *inner]


class Simulation(nn.Module):
    """A program carried out in PyTorch: what the ONNX model must answer, to the last bit where it is promised."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.last: dict[str, int] = {}
        for index, (_, inputs, _made) in enumerate(program.steps):
            self.last.update(dict.fromkeys(inputs, index))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.values(x, ())[self.program.output]

    @torch.no_grad()
    def values(self, x: Tensor, kept: Sequence[str]) -> dict[str, Tensor]:
        """The output and the values in `kept`, by name; others are dropped when the last step has read them."""
        held = {self.program.source.name: x}
        wanted = {*kept, self.program.output}
        for index, (step, inputs, made) in enumerate(self.program.steps):
            held[made] = step.run(*(held[name] for name in inputs))
            for name in inputs:
                if self.last[name] == index and name not in wanted:
                    held.pop(name, None)
        return held
