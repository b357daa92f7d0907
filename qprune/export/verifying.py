"""An exported file beside PyTorch on the task's own test data: what is equal, by how much not, and how fast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qprune.errors import UserError
from qprune.export.exporting import NETWORK_KEY, Export, file_of
from qprune.export.lowering import exact_program
from qprune.export.program import Program, Simulation
from qprune.export.runtime import Session, latencies, peak_activation_bytes
from qprune.runs.load import FinishedRun

# Without exact arithmetic two correct programs round some features to different sides, and layers carry that on. The
# bound is on the mean difference of outputs, in steps of 8 bits over their range.
BOUND_LSB = 1.0


@dataclass(frozen=True)
class Difference:
    """Two answers to the same test inputs: elements that differ, and the largest and mean difference in LSB."""

    elements: int
    differing: int
    largest_lsb: float
    mean_lsb: float


@dataclass(frozen=True)
class Verification:
    """What was found. promise: whether equality with the reference is promised; kept: whether that, or else the bound,
    holds. lsb: the unit of differences, 1/128 of the largest output. Latencies in milliseconds, sizes in bytes."""

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


class _Recorder:
    """Calls a network and keeps its inputs and outputs."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self.network = network
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            result = self.network(x).float()
        self.inputs.append(x.detach())
        self.outputs.append(result)
        return result


def verify(run: FinishedRun, fold: str, timed: bool = True) -> Verification:
    """Run the exported file of `run` and its PyTorch reference over the whole evaluation of the run's task.

    Raises UserError when the run cannot be exported, or the file is missing, damaged or of another network.
    """
    made = Export.of(run)
    program = made.program(fold)
    path = file_of(run.folder, "onnx", fold)
    exported, plain = _session(run, path), Session(made.float_bytes())
    name, reference = _reference(made, program, fold)
    recorders = {"onnx": _Recorder(exported), "reference": _Recorder(reference), "trained": _Recorder(made.baked)}
    scores = {key: run.evaluate_as(recorder)[run.task.metric] for key, recorder in recorders.items()}
    # A network's output is on no grid of its own: the unit is that of 8 bits over its range.
    lsb = max(1e-30, *(float(y.abs().max()) for y in recorders["reference"].outputs)) / 128
    to_reference = _difference(recorders["onnx"].outputs, recorders["reference"].outputs, lsb)
    inputs = recorders["onnx"].inputs
    kept = to_reference.differing == 0 if program.promise else to_reference.mean_lsb <= BOUND_LSB
    return Verification(
        signature=run.row.signature,
        fold=fold,
        reference=name,
        promise=program.promise,
        kept=kept,
        lsb=lsb,
        to_reference=to_reference,
        to_trained=_difference(recorders["onnx"].outputs, recorders["trained"].outputs, lsb),
        features=_feature_differences(made, program, inputs[0]) if fold == "integer" else [],
        metric=run.task.metric,
        score_of_row=run.row.score,
        score_trained=scores["trained"],
        score_reference=scores["reference"],
        score_onnx=scores["onnx"],
        integer_layers=exported.layers()[0],
        float_layers=exported.layers()[1],
        float_reasons=sorted({n["why"] for n in program.notes if n["why"] and n["kernel"].startswith("float32")}),
        added_grids=sum(note["kernel"] == "grid" for note in program.notes),
        latency_ms=_timed(plain, exported, inputs[0]) if timed else {},
        file_bytes=_sizes(made, path),
        activation_bytes={"float": peak_activation_bytes(made.float_program()), fold: peak_activation_bytes(program)},
    )


def _session(run: FinishedRun, path: Path) -> Session:
    """The exported file, loaded. Raises UserError unless it is of the network that the run has now."""
    advice = "write it again with qprune export"
    try:
        session = Session(path.read_bytes())
    except Exception as error:  # the runtime and onnx raise errors of many classes of their own
        raise UserError(f"{path} cannot be loaded ({str(error).splitlines()[0]}); {advice}") from error
    if session.metadata.get(NETWORK_KEY, run.network_digest) != run.network_digest:
        raise UserError(f"{path} was exported from another network than the run now has; {advice}")
    return session


def _reference(made: Export, program: Program, fold: str) -> tuple[str, Callable[[Tensor], Tensor]]:
    """What the file is held against: the trained network in float64, or the integer program carried out in PyTorch."""
    if fold == "integer":
        return "the integer network in PyTorch", Simulation(program).eval()
    if not program.promise:
        return "the trained network in PyTorch, float32", made.baked
    exact = copy.deepcopy(made.baked).double()
    return "the trained network in PyTorch, float64", lambda x: exact(x.double())


def _difference(ours: list[Tensor], theirs: list[Tensor], lsb: float) -> Difference:
    elements = differing = 0
    largest = total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        gap = (a.double() - b.double()).abs()
        elements, differing = elements + gap.numel(), differing + int((a != b).sum())
        largest, total = max(largest, float(gap.max())), total + float(gap.sum())
    return Difference(elements, differing, largest / lsb, total / elements / lsb)


def _feature_differences(made: Export, program: Program, x: Tensor) -> list[dict[str, Any]]:
    """At every grid that was trained: how many elements of the first test batch differ from the trained network's."""
    exact = exact_program(made.trace, made.dynamic_size)
    pairs = [(n.path, exact.nodes[n.name], program.nodes[n.name]) for n in made.trace.nodes if n.op == "grid"]
    theirs = Simulation(exact).values(x, [a.name for _, a, _b in pairs])
    ours = Simulation(program).values(x, [b.name for _, _a, b in pairs])
    rows = []
    for path, a, b in pairs:
        assert a.grid is not None
        step = 2.0**a.grid.decimal
        whole = theirs[a.name].double() * step
        other = ours[b.name].double() * (1.0 if b.form == "uint8" else step)
        if b.grid is not None and b.grid.low >= 0:
            whole = whole.clamp(min=0)  # only ReLUs read it, and the integer network drops what they would
        gap = (whole - other).abs()
        site = path.removesuffix("_operators").removesuffix(".output").removesuffix("input") or "input"
        rows.append({"site": site, "differing": float((gap > 0).double().mean()), "largest_lsb": float(gap.max())})
    return rows


def _timed(plain: Session, exported: Session, batch: Tensor) -> dict[str, dict[str, float]]:
    found = {}
    for count in sorted({1, len(batch)}):
        found[f"batch {count}"] = latencies({"float": plain, "exported": exported}, batch[:count])
    return found


def _sizes(made: Export, path: Path) -> dict[str, int]:
    return {
        "float onnx": len(made.float_bytes()),
        path.name: path.stat().st_size,
        "feature masks in it": _mask_bytes(made),
        "sparse": len(made.sparse_bytes()),
        "counted weights": round(made.run.row.weight_bits_actual / 8),
    }


def _mask_bytes(made: Export) -> int:
    return sum(-(-node.tensors["mask"].numel() // 8) for node in made.trace.nodes if node.op == "mask")
