"""From a finished run to files: ONNX with integer weights, and the sparse form."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from qprune import __version__
from qprune.atomic_write import write_atomically
from qprune.compression.operator import Operator
from qprune.errors import UserError, one_of
from qprune.export.calibration import missing_decimals
from qprune.export.integer import integer_program
from qprune.export.lowering import exact_program
from qprune.export.program import Program
from qprune.export.sparse import SUFFIX, sparse_bytes
from qprune.export.stored import FORMS as WEIGHTS
from qprune.export.tracing import Trace, trace
from qprune.runs.load import FinishedRun

FOLDER = "export"
FOLDS = ("integer", "exact")
FORMS = ("onnx", "sparse")
NETWORK_KEY = "qprune.network"  # the SHA-256 of the trained network's file


@dataclass
class Export:
    """A run's network, ready to be written. Its ONNX forms raise UserError for what cannot be exported."""

    run: FinishedRun
    baked: nn.Module

    @classmethod
    def of(cls, run: FinishedRun) -> Export:
        """The network of `run`. Raises UserError where nothing was compressed."""
        if not run.compressor.placed:
            raise UserError(f"{run.folder} is a run without operators: there is nothing compressed to export")
        run.task.network.eval()
        return cls(run, run.compressor.bake().eval())

    @cached_property
    def trace(self) -> Trace:
        """The network's operations at an input of training size."""
        return trace(self.run.task.network, self.run.example)

    @cached_property
    def dynamic_size(self) -> bool:
        """Whether the network's first test input has another size than its training ones."""
        example = self.run.example
        sizes: set[torch.Size] = set()

        def look(x: Tensor) -> Tensor:
            sizes.add(x.shape[2:])
            raise _SeenError

        with suppress(_SeenError):
            self.run.evaluate_as(look)
        return sizes != {example.shape[2:]}

    def program(self, fold: str, weights: str = "auto") -> Program:
        """The network as steps: `exact`, as trained, or `integer`, in integer kernels (weights: `integer_program`)."""
        one_of("--fold", fold, FOLDS)
        if fold == "exact":
            return exact_program(self.trace, self.dynamic_size)
        decimals = missing_decimals(self.baked, self.trace, [self.run.training_input()])
        return integer_program(self.trace, self.dynamic_size, decimals, weights)

    def float_program(self) -> Program:
        """The same network without operators, in float32: what sizes and times are compared with."""
        plain = copy.deepcopy(self.run.task.network)
        for module in plain.modules():
            if isinstance(module, Operator):
                module.active = False
        return exact_program(trace(plain, self.run.example), self.dynamic_size)

    def metadata(self, fold: str, program: Program | None = None) -> dict[str, str]:
        """What the file says of itself."""
        row = self.run.row
        told = {
            "qprune.version": __version__,
            "qprune.signature": row.signature,
            NETWORK_KEY: self.run.network_digest,
            "qprune.task": row.task,
            "qprune.recipe": row.notation,
            "qprune.fold": fold,
            "qprune.score": f"{row.metric}={row.score!r}",
            "qprune.weight_bits_actual": f"{row.weight_bits_actual:.0f}",
            "qprune.feature_bits_actual": f"{row.feature_bits_actual:.0f}",
            "qprune.quantize": json.dumps(self.run.config.plain()["quantize"], sort_keys=True),
            "qprune.prune": json.dumps(self.run.config.plain()["prune"], sort_keys=True),
        }
        if program is not None:
            told["qprune.equal_to_reference"] = str(program.promise).lower()
            told["qprune.layers"] = json.dumps(program.notes)
        return told

    def onnx_bytes(self, fold: str, program: Program) -> bytes:
        """The content of the ONNX file."""
        content: bytes = program.model(self.dynamic_size, self.metadata(fold, program)).SerializeToString()
        return content

    def float_bytes(self) -> bytes:
        """The ONNX file of the network without operators."""
        content: bytes = self.float_program().model(self.dynamic_size, {}).SerializeToString()
        return content

    def sparse_bytes(self) -> bytes:
        """The content of the sparse file."""
        return sparse_bytes(self.run.task.network, self.baked, self.metadata("none"))


def file_of(folder: Path, form: str, fold: str) -> Path:
    """Where an export of the run in `folder` is kept."""
    return folder / FOLDER / (f"{fold}.onnx" if form == "onnx" else f"network{SUFFIX}")


class _SeenError(Exception):
    """Stops an evaluation when its first input has been seen."""


def export(run: FinishedRun, form: str, fold: str, weights: str = "auto") -> tuple[Path, Program | None]:
    """Write one form of a run's network into the run's folder. Returns the file and, for ONNX, its steps."""
    one_of("--to", form, FORMS)
    one_of("--weights", weights, tuple(WEIGHTS))
    made = Export.of(run)
    program = made.program(fold, weights) if form == "onnx" else None
    content = made.sparse_bytes() if program is None else made.onnx_bytes(fold, program)
    path = file_of(run.folder, form, fold)
    write_atomically(path, content)
    return path, program
