"""Write a network as a project of hls4ml, and emulate it on this machine."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn

from qprune.errors import UserError
from qprune.export.grid_forms import QONNX, QONNX_DOMAIN
from qprune.export.onnx_files import EARLIER_OPSET, to_onnx
from qprune.export.quant_graph import LAYERS, relu_before_grid, rewrite
from qprune.export.trace import Inputs, arguments, operation, trace, with_custom_operators

FRACTION_BITS = 40  # of biases, norms and the input
WIDE = f"fixed<{FRACTION_BITS + 24},24>"
# hls4ml computes these functions by tables over inputs from -4 to 4 and from -8 to 8.
_TABLES, _ENTRY = {"Tanh": 8, "Sigmoid": 16}, "fixed<34,2>"


class HlsProject:
    """A project of hls4ml, compiled with g++ for emulation.

    Attributes:
        model: hls4ml's own model.
        reference: The same network in PyTorch.
        cut: What was cut off behind the last layer of both, or empty.
        rough: Functions whose table has not an entry for every input, which lies on no grid.
    """

    def __init__(self, model: Any, reference: fx.GraphModule, cut: str, rough: list[str]) -> None:
        self.model, self.reference, self.cut, self.rough = model, reference, cut, rough

    def types(self) -> dict[str, str]:
        """Return the type of each layer's output."""
        layers = self.model.get_layers()
        return {layer.name: str(layer.get_output_variable().type.precision) for layer in layers}

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the hardware computes for x (B, C, H, W) or (B, C), in the network's layout, but flat."""
        last = x.movedim(1, -1).contiguous().numpy()
        return torch.from_numpy(self.model.predict(last)).reshape(len(x), -1)

    @torch.no_grad()
    def differing(self, x: Tensor) -> tuple[int, int]:
        """Return how many outputs for x differ from PyTorch, and of how many."""
        expected = self.reference(x)[0].flatten(1)
        return int((self(x) != expected).sum()), expected.numel()


def export_hls4ml(network: nn.Module, example: Any, folder: Path | str, backend: str = "Vitis") -> HlsProject:
    """Write a compressed network as a project of hls4ml and compile it for emulation; no vendor's tools are needed.

    A pixel shuffle at the end, which hls4ml cannot read, is cut off. A tanh or sigmoid becomes a table: exact where its
    input has a grid, with an entry for each of its numbers; else not.

    Args:
        network: As `compress` left it, of one input.
        example: One input, as in `compress`.
        folder: The project's folder.
        backend: One of hls4ml's backends.

    Raises:
        UserError: hls4ml or qonnx is not installed, or hls4ml cannot read an operation, which it names.
    """
    for package in ("hls4ml", "qonnx"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; type: pip install 'qprune[hls4ml]'")
    import hls4ml

    inputs = Inputs.of(example)
    traced = trace(with_custom_operators(network, "values of one grid"), inputs)
    cut = _cut_shuffle(traced)
    _round_biases(traced)
    reference = copy.deepcopy(traced)
    rewrite(reference)
    relu_before_grid(traced)
    model, truncating = _channels_last(to_onnx(traced, inputs.flat, QONNX, EARLIER_OPSET))
    config = hls4ml.utils.config.config_from_onnx_model(
        model, granularity="name", backend=backend, default_precision=WIDE
    )
    rough = _size_tables(model, config["LayerName"])
    try:
        made = hls4ml.converters.convert_from_onnx_model(
            model, output_dir=str(folder), backend=backend, io_type="io_parallel", hls_config=config
        )
    except Exception as error:  # hls4ml raises plain exceptions
        raise UserError(f"hls4ml cannot read {type(network).__name__}: {error}") from error
    for layer in made.get_layers() if truncating else ():  # `trunc` is refused at conversion, and legal as a type
        precision = layer.get_output_variable().type.precision
        if str(precision).startswith("fixed") and "TRN,SAT" in str(precision):
            precision.rounding_mode = "TRN_ZERO"
    made.compile()
    return HlsProject(made, reference, cut, rough)


def _round_biases(traced: fx.GraphModule) -> None:
    """Round biases to the fraction bits that hardware adds them with."""
    for node in traced.graph.nodes:
        bias: Any = arguments(node).get("bias") if operation(node) in LAYERS else None
        if bias is not None:
            constant = attrgetter(str(bias.target))(traced)
            constant.data.copy_((constant.double() * 2.0**FRACTION_BITS).round() * 2.0**-FRACTION_BITS)


def _size_tables(model: Any, config: dict[str, Any]) -> list[str]:
    """Give a function that reads a grid a table with an entry for each number; return the names of others."""
    rough = []
    for node in model.graph.node:
        source = model.find_producer(node.input[0]) if node.op_type in _TABLES else None
        if source is not None and source.op_type == "Quant":
            step = float(model.get_initializer(source.input[1]).max())
            config[node.name]["TableSize"] = max(1, round(_TABLES[node.op_type] / step))
            config[node.name]["Precision"]["table"] = _ENTRY
        elif node.op_type in _TABLES:
            rough.append(node.name)
    return rough


def _cut_shuffle(traced: fx.GraphModule) -> str:
    """Cut a pixel shuffle off the end; return what was cut."""
    [output] = [node for node in traced.graph.nodes if node.op == "output"]
    [last] = output.all_input_nodes
    if operation(last) != "pixel_shuffle":
        return ""
    output.args = ((last.args[0],),)
    traced.graph.erase_node(last)
    traced.recompile()
    return "pixel_shuffle"


def _channels_last(model: onnx.ModelProto) -> tuple[Any, bool]:
    """Return the model as hls4ml reads it, and whether its grids round by `trunc`."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
    from qonnx.transformation.gemm_to_matmul import GemmToMatMul
    from qonnx.util.cleanup import cleanup_model

    for end in (model.graph.input[0], model.graph.output[0]):
        end.type.tensor_type.shape.dim[0].dim_value = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GemmToMatMul, of opsets after 9
        clean = cleanup_model(ModelWrapper(model)).transform(GemmToMatMul())
        clean = cleanup_model(clean).transform(ConvertToChannelsLastAndClean(make_input_channels_last=True))
        clean = cleanup_model(clean)
    truncating = False
    for node in clean.graph.node:
        if node.domain == QONNX_DOMAIN and node.op_type == "Quant":
            attributes = {attribute.name: attribute for attribute in node.attribute}
            if attributes["rounding_mode"].s == b"DOWN":
                attributes["rounding_mode"].s = b"FLOOR"  # the same for grids without a sign
                truncating = True
    return clean, truncating
