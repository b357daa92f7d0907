"""Joint quantization and pruning of weights and features, in either order, measured as performance density.

The public names are imported when they are first used, so that the command line answers without loading torch.
"""

# ruff: noqa: I001

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `as` exports a name; ruff would give each a line of its own
    from qprune.compression.auto_plan import auto_plan as auto_plan
    from qprune.compression.compressor import Compressor as Compressor, attach as attach, compress as compress
    from qprune.compression.config import PruneConfig as PruneConfig, QuantizeConfig as QuantizeConfig
    from qprune.compression.convert import convert as convert
    from qprune.compression.cost import Cost as Cost, LayerCost as LayerCost, cost as cost
    from qprune.compression.coverage import Coverage as Coverage, coverage as coverage
    from qprune.compression.footprint import (
        Footprint as Footprint,
        PaperSize as PaperSize,
        actual_footprint as actual_footprint,
        paper_footprint as paper_footprint,
    )
    from qprune.compression.functional import (
        fake_quantize as fake_quantize,
        magnitude_mask as magnitude_mask,
        optimal_decimal as optimal_decimal,
        prune as prune,
        saturate as saturate,
    )
    from qprune.compression.plan import Plan as Plan, Site as Site
    from qprune.compression.prepare import prepare as prepare
    from qprune.compression.pruner import Pruner as Pruner
    from qprune.compression.quantizer import Quantizer as Quantizer
    from qprune.compression.schedule import Schedule as Schedule, Timeline as Timeline
    from qprune.errors import RunFailure as RunFailure, UserError as UserError
    from qprune.export.onnx_files import export_onnx as export_onnx
    from qprune.export.verification import verify_onnx as verify_onnx

__version__ = "0.1.0"
# Goes up when a run of the same config and seed on the same machine gives other bits; rows of before there was a
# number have 1.
ARITHMETIC = 2

_MODULES = {
    "compression.auto_plan": ("auto_plan",),
    "compression.compressor": ("Compressor", "attach", "compress"),
    "compression.config": ("PruneConfig", "QuantizeConfig"),
    "compression.convert": ("convert",),
    "compression.cost": ("Cost", "LayerCost", "cost"),
    "compression.coverage": ("Coverage", "coverage"),
    "compression.footprint": ("Footprint", "PaperSize", "actual_footprint", "paper_footprint"),
    "compression.functional": ("fake_quantize", "magnitude_mask", "optimal_decimal", "prune", "saturate"),
    "compression.plan": ("Plan", "Site"),
    "compression.prepare": ("prepare",),
    "compression.pruner": ("Pruner",),
    "compression.quantizer": ("Quantizer",),
    "compression.schedule": ("Schedule", "Timeline"),
    "errors": ("RunFailure", "UserError"),
    "export.onnx_files": ("export_onnx",),
    "export.verification": ("verify_onnx",),
}
_MODULE = {name: module for module, names in _MODULES.items() for name in names}
# Names up to version 0.1, which stay.
_ALIASES = {
    "Pruning": "PruneConfig",
    "Quantization": "QuantizeConfig",
    "Untouched": "Coverage",
    "quantize": "fake_quantize",
    "untouched": "coverage",
}

__all__ = list(_MODULE)


def __getattr__(name: str) -> Any:
    name = _ALIASES.get(name, name)
    if name not in _MODULE:
        raise AttributeError(f"module 'qprune' has no attribute {name!r}")
    return getattr(import_module(f"qprune.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *_ALIASES, "__version__"]
