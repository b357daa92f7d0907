"""Costs of networks of others, against the counters of others: torch's, and QONNX's on a real export."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("onnxscript", reason="the extra `export` is not installed")
pytest.importorskip("qonnx", reason="the extra `qonnx` is not installed")

from qonnx.core.modelwrapper import ModelWrapper
from qonnx.util.inference_cost import inference_cost

from qprune.compression.cost import cost
from qprune.export.onnx_files import plain_onnx
from qprune.export.trace import Inputs
from tests.networks.report import attached, train
from tests.networks.zoo import ZOO

pytestmark = pytest.mark.filterwarnings("ignore")


def test_products_are_those_of_an_export_and_of_torch() -> None:
    [entry] = [each for each in ZOO if (each.name, each.library) == ("MobileNetV2", "torchvision")]
    compressor = attached(entry)
    train(entry, compressor)
    network, x = compressor.network.eval(), entry.example()
    model = plain_onnx(network, Inputs.of(x), "qonnx").model
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = len(x)
    for info in model.graph.output:
        info.type.tensor_type.ClearField("shape")
    ours = cost(network, x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    found = inference_cost(ModelWrapper(model), discount_sparsity=False)["total_cost"]
    assert ours.total()["macs"] == found["total_macs"] == counter.get_total_flops() / 2
