"""Write a network as ONNX by torch's exporter, in several forms."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import fx, nn

from qprune import __version__
from qprune.atomic_write import write_atomically
from qprune.compression.convert import convert
from qprune.errors import one_of
from qprune.export import quant_graph
from qprune.export.grid_forms import QDQ, QONNX
from qprune.export.integer_kernels import TRANSLATIONS, write_weight
from qprune.export.integer_program import IntegerProgram, calibrate, integer_program
from qprune.export.packing import pack
from qprune.export.trace import Inputs, arguments, cannot, operation, trace, with_custom_operators

FORMS = ("float", "qdq", "qonnx", "integer")
OPSET = 21  # the first with 4-bit integers and QuantizeLinear to 16 bits
FUSED = "a runtime fuses operations on floats and adds in an order of its own"
EARLIER_OPSET = 20  # onnxruntime 1.32 refuses some pairs of later QuantizeLinear that it moves itself


@dataclass
class OnnxNetwork:
    """A network in one form, as ONNX.

    Attributes:
        model: The model.
        program: Of the form `integer`, the same in PyTorch.
        rounds: Why equality with PyTorch is not promised, or an empty text.
    """

    model: onnx.ModelProto
    program: IntegerProgram | None = None
    rounds: str = ""

    def add_metadata(self, entries: Mapping[str, str]) -> None:
        """Add entries `qprune.*` to those that are there."""
        for key, value in entries.items():
            self.model.metadata_props.add(key=f"qprune.{key}", value=value)


def export_onnx(
    network: nn.Module,
    example: Any,
    path: Path | str,
    form: str = "float",
    any_size: bool = False,
) -> OnnxNetwork:
    """Write a network to an ONNX file that takes batches of any size.

    Args:
        network: A compressed network, as `compress` left it, or any other one for `float`. It is not changed.
        example: One input: a tensor, a tuple of arguments or a dict of arguments by name.
        path: The file.
        form: `float`: the converted network, its grids simulated by plain nodes. `qdq`: QuantizeLinear and
            DequantizeLinear, as onnxruntime, TensorRT and OpenVINO read them. `qonnx`: Quant nodes, as FINN and hls4ml
            read them. `integer`: 8-bit integer kernels with batch norms folded in; a tensor that was trained without a
            grid gets one by the example, so give a batch of training data.
        any_size: Whether dimensions from 2 on, as height and width, are free too.

    Returns:
        What was written.

    Raises:
        UserError: torch cannot export the network, for a reason that is given, or `form` is unknown.
    """
    one_of("form", form, FORMS)
    inputs = Inputs.of(example, any_size)
    if form == "integer":
        made = integer_onnx(integers_of(network, inputs), inputs)
    else:
        made = plain_onnx(network, inputs, form)
    made.add_metadata({"form": form, "version": __version__})
    write_atomically(Path(path), made.model.SerializeToString())
    return made


def plain_onnx(network: nn.Module, inputs: Inputs, form: str) -> OnnxNetwork:
    """Return the network in floats, or with its grids as nodes of `qdq` or `qonnx`."""
    if form == "float":
        return OnnxNetwork(to_onnx(convert(network).eval(), inputs), rounds=FUSED)
    if form == "qonnx":
        traced, rounds = quant_graph_of(network, inputs)
        return OnnxNetwork(to_onnx(traced, inputs.flat, QONNX, EARLIER_OPSET), rounds=rounds)
    traced = trace(with_custom_operators(network), inputs)
    quant_graph.relu_before_grid(traced)
    wide = any(operation(node) in ("grid", "weight") and arguments(node)["bits"] > 8 for node in traced.graph.nodes)
    return OnnxNetwork(to_onnx(traced, inputs.flat, QDQ, OPSET if wide else EARLIER_OPSET), rounds=FUSED)


def quant_graph_of(network: nn.Module, inputs: Inputs) -> tuple[fx.GraphModule, str]:
    """Return what a file of Quant nodes computes, in PyTorch, and why the two may differ, or an empty text."""
    traced = trace(with_custom_operators(network, "values"), inputs)
    return traced, quant_graph.rewrite(traced)


def integers_of(network: nn.Module, inputs: Inputs, calibration: Any = None) -> IntegerProgram:
    """Return a compressed network in integer kernels.

    Args:
        network: A compressed network.
        inputs: Its example inputs.
        calibration: Inputs for grids that training did not choose; default: the example.
    """
    traced = trace(with_custom_operators(network), inputs)
    given = inputs if calibration is None else Inputs.of(calibration)
    return integer_program(traced, calibrate(traced, given.leaves))


def integer_onnx(program: IntegerProgram, inputs: Inputs, weights: str = "auto") -> OnnxNetwork:
    """Return an integer program as ONNX; for the type of `weights`, see `packing`."""
    translations = {**TRANSLATIONS, torch.ops.qprune.weight.default: write_weight}
    made = OnnxNetwork(to_onnx(program.module, inputs.flat, translations), program, program.rounds)
    pack(made.model, program.unsigned, weights)
    made.add_metadata({"equal_to_reference": str(not program.rounds).lower(), "layers": json.dumps(program.notes)})
    return made


def to_onnx(
    network: nn.Module, inputs: Inputs, translations: Mapping[Any, Any] = TRANSLATIONS, opset: int = OPSET
) -> onnx.ModelProto:
    """Return a network as ONNX, from `input` to `output`, numbered if there are several."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter to its own developers
        try:
            program = torch.onnx.export(
                network,
                inputs.args,
                kwargs=inputs.kwargs,
                dynamic_shapes=inputs.shapes,
                custom_translation_table=dict(translations),
                opset_version=opset,
                verbose=False,
            )
        except Exception as error:  # of torch.onnx.errors and others
            raise cannot(type(network).__name__, "torch.onnx.export", error) from error
    assert program is not None
    for values, name in ((program.model.graph.inputs, "input"), (program.model.graph.outputs, "output")):
        for index, value in enumerate(values):
            value.name = name if len(values) == 1 else f"{name}_{index}"
    model = program.model_proto  # built at each access
    graph = model.graph
    for each in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        each.ClearField("metadata_props")  # paths and stacks of this machine
    graph.ClearField("value_info")
    return model
