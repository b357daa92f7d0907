"""Write the network of a finished run: ONNX in two folds, and the sparse form."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NoReturn

from torch import Tensor

from qprune import __version__
from qprune.atomic_write import write_atomically
from qprune.compression.convert import with_plain_weights
from qprune.compression.operator import Operator
from qprune.compression.prepare import find_operators
from qprune.errors import UserError, one_of
from qprune.export.float_lowering import exact_program
from qprune.export.integer_lowering import calibrate, integer_program
from qprune.export.program import Program
from qprune.export.sparse import SUFFIX, sparse_bytes
from qprune.export.steps import WEIGHT_TYPES
from qprune.export.trace import Trace, trace
from qprune.runs.load import FinishedRun

FOLDER = "export"
FOLDS = ("integer", "exact")
FORMS = ("onnx", "sparse")


def export_run(
    run: FinishedRun, form: str, fold: str = "integer", weights: str = "auto"
) -> tuple[Path, Program | None]:
    """Write one form of a run's network into the folder `export` of the run.

    Args:
        run: The finished run.
        form: `onnx` or `sparse`.
        fold: `integer`, 8-bit integer kernels with batch norms folded in, or `exact`, the trained network in floats.
        weights: Type of integer weights: `auto`, chosen by the CPU that loads the file, `safe` or `signed`.

    Returns:
        The file and, for ONNX, its steps.

    Raises:
        UserError: The network cannot be exported in this form.
    """
    one_of("--to", form, FORMS)
    one_of("--weights", weights, WEIGHT_TYPES)
    network = ExportableRun(run)
    program = network.program(fold, weights) if form == "onnx" else None
    if program is None:
        content = network.sparse_bytes()
    else:
        content = program.onnx_bytes(network.dynamic_size, network.metadata(fold, program))
    path = exported_file(run.folder, form, fold)
    write_atomically(path, content)
    return path, program


def exported_file(folder: Path, form: str, fold: str) -> Path:
    """Return where an export of the run in `folder` is stored."""
    return folder / FOLDER / (f"{fold}.onnx" if form == "onnx" else f"network{SUFFIX}")


class ExportableRun:
    """The network of a run in all its forms."""

    def __init__(self, run: FinishedRun) -> None:
        if not any(find_operators(run.task.network)):
            raise UserError(f"{run.folder} is a run without operators: there is nothing compressed to export")
        self.run, self.network = run, run.task.network.eval()
        self.converted = with_plain_weights(run.task.network).eval()

    @cached_property
    def trace(self) -> Trace:
        """The operations of the network, at an input of training size."""
        return trace(self.network, self.run.example)

    @cached_property
    def dynamic_size(self) -> bool:
        """Whether the task's first test input has another size than its training inputs."""
        seen: list[Tensor] = []

        def stop(x: Tensor) -> NoReturn:
            seen.append(x)
            raise _StopEvaluationError

        with suppress(_StopEvaluationError):
            self.run.evaluate_as(stop)
        return not seen or seen[0].shape[2:] != self.run.example.shape[2:]

    def program(self, fold: str, weights: str = "auto") -> Program:
        """Return the steps of one fold."""
        one_of("--fold", fold, FOLDS)
        if fold == "exact":
            return exact_program(self.trace, self.dynamic_size)
        calibration = calibrate(self.trace, self.run.training_input())
        return integer_program(self.trace, self.dynamic_size, calibration, weights)

    @cached_property
    def float_program(self) -> Program:
        """The same network without operators, in float32: the base of sizes and latencies."""
        plain = copy.deepcopy(self.network)
        for module in plain.modules():
            if isinstance(module, Operator):
                module.updates.zero_()  # none of its events has fired
        return exact_program(trace(plain, self.run.example), self.dynamic_size)

    def metadata(self, fold: str, program: Program | None = None) -> dict[str, str]:
        """Return what a file says about its run, and about the steps of an ONNX file."""
        row, config = self.run.row, self.run.config.plain()
        entries = {
            "version": __version__,
            "signature": row.signature,
            "network": self.run.network_digest,
            "task": row.task,
            "recipe": row.notation,
            "fold": fold,
            "score": f"{row.metric}={row.score!r}",
            "weight_bits_actual": f"{row.weight_bits_actual:.0f}",
            "feature_bits_actual": f"{row.feature_bits_actual:.0f}",
            "quantize": json.dumps(config["quantize"], sort_keys=True),
            "prune": json.dumps(config["prune"], sort_keys=True),
        }
        if program is not None:
            entries |= {"equal_to_reference": str(program.exact).lower(), "layers": json.dumps(program.notes)}
        return {f"qprune.{key}": value for key, value in entries.items()}

    def sparse_bytes(self) -> bytes:
        """Return the sparse file."""
        return sparse_bytes(self.network, self.converted, self.metadata("none"))


class _StopEvaluationError(Exception):
    """Ends an evaluation after its first input."""
