"""Joint quantization and pruning of weights and features, in either order, measured as performance density.

The public names are imported when they are first used, so that the command line answers without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qprune.compression.auto_plan import auto_plan
    from qprune.compression.compressor import Compressor, attach, compress
    from qprune.compression.config import PruneConfig, QuantizeConfig
    from qprune.compression.convert import convert
    from qprune.compression.coverage import Coverage, coverage
    from qprune.compression.footprint import Footprint, PaperSize, actual_footprint, paper_footprint
    from qprune.compression.functional import fake_quantize, magnitude_mask, optimal_decimal, prune, saturate
    from qprune.compression.plan import Plan, Site
    from qprune.compression.prepare import prepare
    from qprune.compression.pruner import Pruner
    from qprune.compression.quantizer import Quantizer
    from qprune.compression.schedule import Schedule, Timeline
    from qprune.errors import RunFailure, UserError

__version__ = "0.1.0"
# Goes up when a run of the same config and seed on the same machine gives other bits; rows of before there was a
# number have 1.
ARITHMETIC = 2

_MODULES = {
    "compression.auto_plan": ("auto_plan",),
    "compression.compressor": ("Compressor", "attach", "compress"),
    "compression.config": ("PruneConfig", "QuantizeConfig"),
    "compression.convert": ("convert",),
    "compression.coverage": ("Coverage", "coverage"),
    "compression.footprint": ("Footprint", "PaperSize", "actual_footprint", "paper_footprint"),
    "compression.functional": ("fake_quantize", "magnitude_mask", "optimal_decimal", "prune", "saturate"),
    "compression.plan": ("Plan", "Site"),
    "compression.prepare": ("prepare",),
    "compression.pruner": ("Pruner",),
    "compression.quantizer": ("Quantizer",),
    "compression.schedule": ("Schedule", "Timeline"),
    "errors": ("RunFailure", "UserError"),
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

__all__ = [
    "Compressor",
    "Coverage",
    "Footprint",
    "PaperSize",
    "Plan",
    "PruneConfig",
    "Pruner",
    "QuantizeConfig",
    "Quantizer",
    "RunFailure",
    "Schedule",
    "Site",
    "Timeline",
    "UserError",
    "actual_footprint",
    "attach",
    "auto_plan",
    "compress",
    "convert",
    "coverage",
    "fake_quantize",
    "magnitude_mask",
    "optimal_decimal",
    "paper_footprint",
    "prepare",
    "prune",
    "saturate",
]


def __getattr__(name: str) -> Any:
    name = _ALIASES.get(name, name)
    if name not in _MODULE:
        raise AttributeError(f"module 'qprune' has no attribute {name!r}")
    return getattr(import_module(f"qprune.{_MODULE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *_ALIASES, "__version__"]
