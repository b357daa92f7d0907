"""onnxruntime: sessions on one thread, which kernels a model really gets, and how long it takes beside others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from qprune.export.program import Program

INTEGER_LAYERS = ("QLinearConv", "QGemm", "ConvInteger", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat")
FLOAT_LAYERS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "ConvTranspose")
WARMING = 3  # calls that are not timed


class Session:
    """A model in onnxruntime, on one CPU thread."""

    def __init__(self, content: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with TemporaryDirectory() as folder:
            path = Path(folder, "optimized.onnx")
            options.optimized_model_filepath = str(path)
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            nodes = onnx.load(path, load_external_data=False).graph.node
        self.kernels = Counter(node.op_type for node in nodes)
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map

    def __call__(self, x: Tensor) -> Tensor:
        result = self.session.run(None, {"input": np.ascontiguousarray(x.detach().cpu().numpy())})[0]
        return torch.from_numpy(result)

    def layers(self) -> tuple[int, int]:
        """Layers that run in integers, and in floats, after the runtime's own optimizations."""
        return sum(self.kernels[op] for op in INTEGER_LAYERS), sum(self.kernels[op] for op in FLOAT_LAYERS)


def latencies(functions: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, seconds: float = 4.0) -> dict[str, float]:
    """Median milliseconds of each function on x, taken in turns in this process, within about `seconds`."""
    for function in functions.values():
        for _ in range(WARMING):
            function(x)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not taken[next(iter(taken))]:
        for name, function in functions.items():
            start = time.perf_counter()
            function(x)
            taken[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(times)) for name, times in taken.items()}


def peak_activation_bytes(program: Program) -> int:
    """The largest sum of values alive at once, for one sample at the example's size, as the steps are ordered.

    Weights and what a kernel needs inside are not counted, nor is what the runtime fuses away.
    """
    width = {"uint8": 1, "float32": 4, "float64": 8}
    size = {name: width[value.form] * int(np.prod(value.shape[1:])) for name, value in program.values.items()}
    last = {name: index for index, (_, inputs, _made) in enumerate(program.steps) for name in inputs}
    alive, peak = {program.source.name}, 0
    for index, (_, inputs, made) in enumerate(program.steps):
        alive.add(made)
        peak = max(peak, sum(size[name] for name in alive))
        alive -= {name for name in inputs if last[name] == index and name != program.output}
    return peak
