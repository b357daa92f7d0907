"""Compare an exported file with PyTorch: equality, score, latency, size."""

from __future__ import annotations

import copy
import math
import statistics
import time
import timeit
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from qprune.compression.convert import with_plain_weights
from qprune.compression.prepare import run_example, tensors_in
from qprune.errors import UserError
from qprune.export.files import (
    exported_file,
    integers_of_run,
    quant_graph_of_run,
    sparse_of_run,
    uncompressed_onnx,
)
from qprune.export.grid_forms import QONNX_DOMAIN
from qprune.export.integer_program import IntegerProgram
from qprune.export.onnx_files import FUSED
from qprune.export.trace import run_and_keep
from qprune.runs.load import FinishedRun

INTEGER_KERNELS = ("QLinearConv", "QGemm", "ConvInteger", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat")
FLOAT_KERNELS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "ConvTranspose")
WARMUP_CALLS = 3
# Without exact arithmetic, two correct programs round some features to different sides of a grid, and the layers behind
# amplify it. The bound is on the mean difference of outputs.
BOUND_LSB = 1.0


class Session:
    """A model in onnxruntime on one CPU thread.

    kernels: its nodes by type, after the runtime's optimizations.
    """

    def __init__(self, content: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
        self.kernels = Counter(node.op_type for node in nodes)
        self.metadata: dict[str, str] = self.session.get_modelmeta().custom_metadata_map

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """Return all outputs for tensors in the order of the network's inputs."""
        names = [each.name for each in self.session.get_inputs()]
        given = {name: x.detach().cpu().contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(array) for array in self.session.run(None, given)]

    def __call__(self, x: Tensor) -> Tensor:
        return self.outputs(x)[0]


class QuantSession:
    """A model with Quant nodes in the executor of the package qonnx, node by node."""

    def __init__(self, model: onnx.ModelProto) -> None:
        if find_spec("qonnx") is None:
            raise UserError("qonnx is not installed; type: pip install 'qprune[qonnx]'")
        # qonnx imports the module that a node's domain names, and other nodes of its own read files
        named = {(node.domain, node.op_type) for node in model.graph.node if node.domain}
        kinds = {attribute.type for node in model.graph.node for attribute in node.attribute}
        nested = model.functions or kinds & {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}
        if nested or named - {(QONNX_DOMAIN, "Quant"), (QONNX_DOMAIN, "MultiThreshold")}:
            raise ValueError("beside Quant and MultiThreshold nodes it has other nodes than ONNX's own")
        self.model = model
        self.kernels = Counter(node.op_type for node in model.graph.node)
        self.metadata = {entry.key: entry.value for entry in model.metadata_props}

    def outputs(self, *inputs: Tensor) -> list[Tensor]:
        """Return all outputs for tensors in the order of the network's inputs."""
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
        from qonnx.transformation.infer_shapes import InferShapes

        for info, x in zip(self.model.graph.input, inputs, strict=True):
            for dim, size in zip(info.type.tensor_type.shape.dim, x.shape, strict=True):
                dim.dim_value = size
        for info in self.model.graph.output:
            info.type.tensor_type.ClearField("shape")
        model = ModelWrapper(copy.deepcopy(self.model)).transform(InferShapes())
        given = zip(self.model.graph.input, inputs, strict=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that its inference does not find, as of tiled masks
            found = execute_onnx(model, {info.name: x.detach().cpu().numpy() for info, x in given})
        return [torch.from_numpy(found[info.name]) for info in self.model.graph.output]

    def __call__(self, x: Tensor) -> Tensor:
        return self.outputs(x)[0]


@dataclass(frozen=True)
class Difference:
    """How two answers to the same inputs differ. LSB: 1/128 of the largest output of the reference."""

    elements: int
    differing: int
    largest_lsb: float
    mean_lsb: float
    lsb: float

    @classmethod
    def between(cls, ours: Tensor, reference: Tensor) -> Difference:
        """Compare flat outputs."""
        lsb = max(1e-30, float(reference.abs().max())) / 128
        gap = (ours.double() - reference.double()).abs() / lsb
        return cls(gap.numel(), int((ours != reference).sum()), float(gap.max()), float(gap.mean()), lsb)


def verify_onnx(network: nn.Module, path: Path | str, data: Any) -> Difference:
    """Compare a file of `export_onnx` with the network in PyTorch.

    A file with Quant nodes runs in the executor of the package qonnx, any other in onnxruntime.

    Args:
        network: The network that was exported.
        path: The file.
        data: Inputs: a tensor, a tuple or a dict, as for the network, or a list of them.
    """
    session = _load(Path(path), "write it again with qprune.export_onnx")
    ours, reference = [], []
    for example in data if isinstance(data, list) else [data]:
        ours += session.outputs(*tensors_in(example))
        reference += tensors_in(run_example(network, example))
    return Difference.between(*(torch.cat([y.flatten().float() for y in each]) for each in (ours, reference)))


@dataclass(frozen=True)
class Verification:
    """The result of `verify_run`.

    rounds: why equality with the reference is not promised, or an empty text. kept: whether the promise holds, or else
    the bound. latency_ms: batch -> `float` and `exported`. Sizes are in bytes.
    """

    signature: str
    form: str
    reference: str
    rounds: str
    kept: bool
    to_reference: Difference
    to_trained: Difference
    features: list[dict[str, Any]]
    metric: str
    score_of_row: float
    score_trained: float
    score_reference: float
    score_onnx: float
    integer_layers: int
    float_layers: int
    float_reasons: list[str]
    added_grids: int
    latency_ms: dict[str, dict[str, float]]
    file_bytes: dict[str, int]


def verify_run(run: FinishedRun, form: str = "integer", timed: bool = True) -> Verification:
    """Compare the exported ONNX file of a run with PyTorch on the task's test data.

    Args:
        run: The finished run.
        form: Which file: one of the forms of `export_onnx`.
        timed: Whether to measure latencies beside the float export of the same network.

    Raises:
        UserError: The file is missing, damaged or of another network, or the network cannot be exported.
    """
    path = exported_file(run.folder, form)
    exported = _load(path, advice := "write it again with qprune export")
    if exported.metadata.get("qprune.network", run.network_digest) != run.network_digest:
        raise UserError(f"{path} was exported from another network than the run now has; {advice}")
    trained = with_plain_weights(run.task.network).eval()
    program, module, rounds, name = None, None, FUSED, "the trained network"
    if form == "integer":
        program = integers_of_run(run)
        module, rounds, name = program.module, program.rounds, "the integer network in PyTorch"
    elif form == "qonnx":
        (module, rounds), name = quant_graph_of_run(run), "the network in PyTorch with biases and norms behind sums"
    reference: Callable[[Tensor], Tensor] = (lambda x: module(x)[0]) if module else trained
    score_reference, inputs, reference_outputs = _evaluate(run, reference)
    try:
        score_onnx, _, outputs = _evaluate(run, exported)
        to_reference = Difference.between(outputs, reference_outputs)
    except Exception as error:  # the runtimes raise many classes of their own
        raise UserError(f"{path} does not compute the network's outputs ({_first_line(error)}); {advice}") from error
    score_trained, _, trained_outputs = _evaluate(run, trained)
    notes = program.notes if program else []
    float_bytes = uncompressed_onnx(run).model.SerializeToString()
    return Verification(
        signature=run.row.signature,
        form=form,
        reference=name,
        rounds=rounds,
        kept=to_reference.mean_lsb <= BOUND_LSB if rounds else to_reference.differing == 0,
        to_reference=to_reference,
        to_trained=Difference.between(outputs, trained_outputs),
        features=_feature_differences(program, inputs[0]) if program else [],
        metric=run.task.metric,
        score_of_row=run.row.score,
        score_trained=score_trained,
        score_reference=score_reference,
        score_onnx=score_onnx,
        integer_layers=sum(exported.kernels[op] for op in INTEGER_KERNELS),
        float_layers=sum(exported.kernels[op] for op in FLOAT_KERNELS),
        float_reasons=sorted({note["why"] for note in notes if note["why"] and note["kernel"] == "float32"}),
        added_grids=sum(note["kernel"] == "grid" for note in notes),
        latency_ms=_latencies({"float": Session(float_bytes), "exported": exported}, inputs[0])
        if timed and isinstance(exported, Session)
        else {},
        file_bytes={
            "float onnx": len(float_bytes),
            path.name: path.stat().st_size,
            "sparse": len(sparse_of_run(run)),
            "counted weights": round(run.row.weight_bits_actual / 8),
        },
    )


def _load(path: Path, advice: str) -> Session | QuantSession:
    try:
        if path.exists() and not path.is_file():  # a pipe would be read for ever
            raise ValueError("it is no file")
        model = onnx.load_from_string(content := path.read_bytes())
        if any(node.domain == QONNX_DOMAIN for node in model.graph.node):
            return QuantSession(model)
        return Session(content)
    except UserError:
        raise
    except Exception as error:  # onnx and onnxruntime raise many classes of their own
        raise UserError(f"{path} cannot be loaded ({_first_line(error)}); {advice}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _evaluate(run: FinishedRun, network: Callable[[Tensor], Tensor]) -> tuple[float, list[Tensor], Tensor]:
    """Evaluate the task with `network`; return score, inputs and flat outputs."""
    inputs, outputs = [], []

    @torch.no_grad()
    def call(x: Tensor) -> Tensor:
        inputs.append(x.detach())
        outputs.append(network(x).float())
        return outputs[-1]

    score = run.evaluate_as(call)[run.task.metric]
    return score, inputs, torch.cat([y.flatten() for y in outputs])


def _feature_differences(program: IntegerProgram, x: Tensor) -> list[dict[str, Any]]:
    """Compare the features at every grid with the trained network, on one batch."""
    expected = run_and_keep(program.traced, (x,), {node for _, node, _ in program.features})
    found = run_and_keep(program.module, (x,), {value.node for _, _, value in program.features})
    rows = []
    for site, node, value in program.features:
        grid = value.on_grid
        real = (found[value.node].double() - value.zero) * grid.scale if value.stored else found[value.node].double()
        # Where only ReLUs read a feature, the integer network stores no negative values.
        gap = (real - expected[node].double().clamp(min=0.0 if grid.low >= 0 else -math.inf)).abs()
        differing, largest = float((gap > 0).double().mean()), float(gap.max()) / grid.scale
        rows.append({"site": site, "differing": differing, "largest_lsb": largest})
    return rows


def _latencies(sessions: Mapping[str, Session], x: Tensor, seconds: float = 4.0) -> dict[str, dict[str, float]]:
    """Return median milliseconds of each session, for one sample and for x."""
    found = {}
    for count in sorted({1, len(x)}):
        taken: dict[str, list[float]] = {name: [] for name in sessions}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken["float"]) <= WARMUP_CALLS:
            for name, session in sessions.items():
                taken[name].append(1e3 * timeit.timeit(partial(session, x[:count]), number=1))
        found[f"batch {count}"] = {name: statistics.median(t[WARMUP_CALLS:]) for name, t in taken.items()}
    return found
