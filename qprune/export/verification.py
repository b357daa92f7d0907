"""Compare an exported file with PyTorch: equality, score, latency, size."""

from __future__ import annotations

import copy
import math
import statistics
import time
import timeit
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from qprune.errors import UserError
from qprune.export.files import ExportableRun, exported_file
from qprune.export.float_lowering import exact_program
from qprune.export.program import Program
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

    def __call__(self, x: Tensor) -> Tensor:
        result = self.session.run(None, {"input": np.ascontiguousarray(x.detach().cpu().numpy())})[0]
        return torch.from_numpy(result)


@dataclass(frozen=True)
class Difference:
    """How two answers to the same inputs differ. LSB: the unit of `Verification.lsb`."""

    elements: int
    differing: int
    largest_lsb: float
    mean_lsb: float


@dataclass(frozen=True)
class Verification:
    """The result of `verify_run`.

    promise: whether equality with the reference is promised. kept: whether that holds, or else the bound. lsb: the unit
    of differences, 1/128 of the largest output. latency_ms: batch -> `float` and `exported`. Sizes are in bytes.
    """

    signature: str
    fold: str
    reference: str
    promise: bool
    kept: bool
    lsb: float
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
    activation_bytes: dict[str, int]


def verify_run(run: FinishedRun, fold: str = "integer", timed: bool = True) -> Verification:
    """Compare the exported ONNX file of a run with PyTorch on the task's test data.

    Args:
        run: The finished run.
        fold: Which file: `integer` or `exact`.
        timed: Whether to measure latencies beside the float export of the same network.

    Raises:
        UserError: The file is missing, damaged or of another network, or the network cannot be exported.
    """
    network = ExportableRun(run)
    program = network.program(fold)
    path = exported_file(run.folder, "onnx", fold)
    exported = _load(run, path)
    name, reference = _reference(network, program, fold)
    score_onnx, inputs, outputs = _evaluate(run, exported)
    score_reference, _, reference_outputs = _evaluate(run, reference)
    score_trained, _, trained_outputs = _evaluate(run, network.converted)
    lsb = max(1e-30, float(reference_outputs.abs().max())) / 128
    to_reference = _difference(outputs, reference_outputs, lsb)
    float_bytes = network.float_program.onnx_bytes(network.dynamic_size, {})
    mask_sizes = [node.tensors["mask"].numel() for node in network.trace.nodes if node.op == "mask"]
    return Verification(
        signature=run.row.signature,
        fold=fold,
        reference=name,
        promise=program.exact,
        kept=to_reference.differing == 0 if program.exact else to_reference.mean_lsb <= BOUND_LSB,
        lsb=lsb,
        to_reference=to_reference,
        to_trained=_difference(outputs, trained_outputs, lsb),
        features=_feature_differences(network, program, inputs[0]) if fold == "integer" else [],
        metric=run.task.metric,
        score_of_row=run.row.score,
        score_trained=score_trained,
        score_reference=score_reference,
        score_onnx=score_onnx,
        integer_layers=sum(exported.kernels[op] for op in INTEGER_KERNELS),
        float_layers=sum(exported.kernels[op] for op in FLOAT_KERNELS),
        float_reasons=sorted({n["why"] for n in program.notes if n["why"] and n["kernel"].startswith("float32")}),
        added_grids=sum(note["kernel"] == "grid" for note in program.notes),
        latency_ms=_latencies({"float": Session(float_bytes), "exported": exported}, inputs[0]) if timed else {},
        file_bytes={
            "float onnx": len(float_bytes),
            path.name: path.stat().st_size,
            "feature masks in it": sum(-(-count // 8) for count in mask_sizes),
            "sparse": len(network.sparse_bytes()),
            "counted weights": round(run.row.weight_bits_actual / 8),
        },
        activation_bytes={
            "float": network.float_program.peak_activation_bytes(),
            fold: program.peak_activation_bytes(),
        },
    )


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


def _load(run: FinishedRun, path: Path) -> Session:
    advice = "write it again with qprune export"
    try:
        session = Session(path.read_bytes())
    except Exception as error:  # onnx and onnxruntime raise many classes of their own
        raise UserError(f"{path} cannot be loaded ({str(error).splitlines()[0]}); {advice}") from error
    if session.metadata.get("qprune.network", run.network_digest) != run.network_digest:
        raise UserError(f"{path} was exported from another network than the run now has; {advice}")
    return session


def _reference(network: ExportableRun, program: Program, fold: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    if fold == "integer":
        return "the integer network in PyTorch", program
    if not program.exact:
        return "the trained network", network.converted
    exact = copy.deepcopy(network.converted).double()
    return "the trained network (in float64)", lambda x: exact(x.double())


def _difference(ours: Tensor, theirs: Tensor, lsb: float) -> Difference:
    gap = (ours.double() - theirs.double()).abs()
    return Difference(gap.numel(), int((ours != theirs).sum()), float(gap.max()) / lsb, float(gap.mean()) / lsb)


def _feature_differences(network: ExportableRun, program: Program, x: Tensor) -> list[dict[str, Any]]:
    """Compare the features at every grid with the trained network, on one batch."""
    exact = exact_program(network.trace, network.dynamic_size)
    sites = [(n.path, exact.nodes[n.name], program.nodes[n.name]) for n in network.trace.nodes if n.op == "grid"]
    expected = exact.run(x, [value.name for _, value, _ in sites])
    found = program.run(x, [value.name for _, _, value in sites])
    rows = []
    for site, a, b in sites:
        # Where only ReLUs read a feature, the integer network stores no negative values.
        lowest = 0.0 if b.grid is not None and b.grid.low >= 0 else -math.inf
        gap = (found[b.name].double() - expected[a.name].double().clamp(min=lowest)).abs()
        largest = float(gap.max()) / a.on_grid.scale
        rows.append({"site": site, "differing": float((gap > 0).double().mean()), "largest_lsb": largest})
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
