"""Write the network of a finished run into the folder `export` of the run, as ONNX or in the sparse form."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, fx

from qprune import __version__
from qprune.atomic_write import own_place, write_atomically
from qprune.compression.convert import with_plain_weights
from qprune.compression.operator import Operator
from qprune.compression.prepare import find_operators
from qprune.errors import UserError, one_of
from qprune.export import onnx_files
from qprune.export.hls import export_hls4ml
from qprune.export.integer_program import IntegerProgram
from qprune.export.integers import integers_bytes
from qprune.export.onnx_files import OnnxNetwork
from qprune.export.packing import WEIGHT_TYPES
from qprune.export.sparse import SUFFIX, sparse_bytes
from qprune.export.trace import Inputs
from qprune.runs.load import FinishedRun

FOLDER = "export"
FORMS = (*onnx_files.FORMS, "integers", "sparse", "hls4ml")
_FILES = {"sparse": f"network{SUFFIX}", "integers": "integers.npz", "hls4ml": "hls4ml"}


@dataclass(frozen=True)
class Exported:
    """What `export_run` wrote.

    Attributes:
        path: The file, or the folder of a project.
        verdict: Whether it is equal to PyTorch, or what is known of it; empty for a file of numbers alone.
        notes: Of the form `integer`, how each layer is computed, see `IntegerProgram`.
    """

    path: Path
    verdict: str = ""
    notes: Sequence[dict[str, Any]] = ()


def export_run(run: FinishedRun, form: str = "integer", weights: str = "auto") -> Exported:
    """Write one form of a run's network into the folder `export` of the run.

    Args:
        run: The finished run.
        form: A form of `export_onnx`, or `integers`, `sparse` or `hls4ml` (a folder).
        weights: Type of integer weights: `auto`, chosen by the CPU that loads the file, `safe` or `signed`.

    Raises:
        UserError: The network cannot be exported in this form.
    """
    one_of("--form", form, FORMS)
    one_of("--weights", weights, WEIGHT_TYPES)
    if not any(find_operators(run.task.network)):
        raise UserError(f"{run.folder} is a run without operators: there is nothing compressed to export")
    path = exported_file(run.folder, form)
    if form == "hls4ml":
        return Exported(path, _write_hls4ml(run, path))
    if form == "sparse":
        write_atomically(path, sparse_of_run(run))
        return Exported(path)
    if form == "integers":
        write_atomically(path, integers_bytes(run.task.network.eval(), _inputs(run), _metadata(run, form)))
        return Exported(path)
    if form == "integer":
        made = onnx_files.integer_onnx(integers_of_run(run), _inputs(run), weights)
    else:
        made = onnx_files.plain_onnx(run.task.network.eval(), _inputs(run), form)
    made.add_metadata(_metadata(run, form))
    write_atomically(path, made.model.SerializeToString())
    verdict = (
        f"equality with PyTorch is not promised: {made.rounds}" if made.rounds else "equal to PyTorch in every bit"
    )
    return Exported(path, verdict, made.program.notes if made.program else ())


def exported_file(folder: Path, form: str) -> Path:
    """Return where an export of the run in `folder` is stored; UserError where that is a link out of it."""
    return own_place(folder, FOLDER) / _FILES.get(form, f"{form}.onnx")


def integers_of_run(run: FinishedRun) -> IntegerProgram:
    """Return the network of a run in integer kernels, in PyTorch."""
    return onnx_files.integers_of(run.task.network.eval(), _inputs(run), run.training_input())


def quant_graph_of_run(run: FinishedRun) -> tuple[fx.GraphModule, str]:
    """Return what the form `qonnx` of a run computes, in PyTorch, and why the two may differ, or an empty text."""
    return onnx_files.quant_graph_of(run.task.network.eval(), _inputs(run))


def uncompressed_onnx(run: FinishedRun) -> OnnxNetwork:
    """Return the same network in floats, without operators: the base of sizes and latencies."""
    plain = copy.deepcopy(run.task.network)
    for module in plain.modules():
        if isinstance(module, Operator):
            module.updates.zero_()  # none of its events has fired
    return onnx_files.plain_onnx(plain, _inputs(run), "float")


def sparse_of_run(run: FinishedRun) -> bytes:
    """Return the sparse file of a run."""
    metadata = {f"qprune.{key}": value for key, value in _metadata(run, "sparse").items()}
    return sparse_bytes(run.task.network, with_plain_weights(run.task.network).eval(), metadata)


def _write_hls4ml(run: FinishedRun, folder: Path) -> str:
    """Write the project of a run; return how it compares with PyTorch in emulation."""
    with redirect_stdout(StringIO()):  # hls4ml prints each layer
        project = export_hls4ml(run.task.network.eval(), run.example, folder)
    differing, elements = project.differing(run.training_input())
    parts = [f"{differing:,} of {elements:,} outputs differ from PyTorch in emulation"]
    if project.cut:
        parts.append(f"{project.cut} is cut off the end")
    parts += [f"{name} is a coarse table: quantize what it reads for an exact one" for name in project.rough]
    return "; ".join(parts)


def _inputs(run: FinishedRun) -> Inputs:
    """Return the example inputs of a run: of any size if the first test input has another one than the example."""
    example, seen = run.example, list[Tensor]()

    def stop(x: Tensor) -> NoReturn:
        seen.append(x)
        raise _StopEvaluationError

    with suppress(_StopEvaluationError):
        run.evaluate_as(stop)
    return Inputs.of(example, any_size=not seen or seen[0].shape[2:] != example.shape[2:])


def _metadata(run: FinishedRun, form: str) -> dict[str, str]:
    """Return what a file says about its run."""
    row, config = run.row, run.config.plain()
    return {
        "version": __version__,
        "signature": row.signature,
        "network": run.network_digest,
        "task": row.task,
        "recipe": row.notation,
        "form": form,
        "score": f"{row.metric}={row.score!r}",
        "weight_bits_actual": f"{row.weight_bits_actual:.0f}",
        "feature_bits_actual": f"{row.feature_bits_actual:.0f}",
        "quantize": json.dumps(config["quantize"], sort_keys=True),
        "prune": json.dumps(config["prune"], sort_keys=True),
    }


class _StopEvaluationError(Exception):
    """Ends an evaluation after its first input."""
