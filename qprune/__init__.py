"""Joint quantization and pruning of weights and features, in either order, measured as performance density.

The public names are imported when they are first used, so that the command line answers without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qprune.compression.compressor import Compressor, attach, compress
    from qprune.compression.config import Pruning, Quantization
    from qprune.compression.coverage import Untouched, untouched
    from qprune.compression.footprint import Footprint, PaperSize, actual_footprint, paper_footprint
    from qprune.compression.functional import magnitude_mask, optimal_decimal, prune, quantize, saturate
    from qprune.compression.plan import Plan, Site
    from qprune.compression.pruner import Pruner
    from qprune.compression.quantizer import Quantizer
    from qprune.compression.schedule import Schedule, Timeline
    from qprune.errors import RunFailure, UserError

__version__ = "0.1.0"

_HOMES = {
    "compression.compressor": ("Compressor", "attach", "compress"),
    "compression.footprint": ("Footprint", "PaperSize", "actual_footprint", "paper_footprint"),
    "compression.functional": ("magnitude_mask", "optimal_decimal", "prune", "quantize", "saturate"),
    "compression.config": ("Pruning", "Quantization"),
    "compression.plan": ("Plan", "Site"),
    "compression.pruner": ("Pruner",),
    "compression.quantizer": ("Quantizer",),
    "compression.schedule": ("Schedule", "Timeline"),
    "compression.coverage": ("Untouched", "untouched"),
    "errors": ("RunFailure", "UserError"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Compressor",
    "Footprint",
    "PaperSize",
    "Plan",
    "Pruner",
    "Pruning",
    "Quantization",
    "Quantizer",
    "RunFailure",
    "Schedule",
    "Site",
    "Timeline",
    "Untouched",
    "UserError",
    "actual_footprint",
    "attach",
    "compress",
    "magnitude_mask",
    "optimal_decimal",
    "paper_footprint",
    "prune",
    "quantize",
    "saturate",
    "untouched",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qprune' has no attribute {name!r}")
    return getattr(import_module(f"qprune.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
