"""The keys of a run's config that are the runner's own, each with its type, range and unit; a task's are its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from qprune.compression.config import TARGETS, WEIGHT_AXES
from qprune.compression.functional import GRADIENTS, MASK_RULES, ROUNDINGS
from qprune.compression.pruner import BORDERS, GRANULARITIES
from qprune.config.signature import LATER_KEYS
from qprune.config.types import Range, Samples, check
from qprune.errors import UserError, closest

_Epochs = Annotated[int, Range(1, 10**6, "epochs")]
_Time = Annotated[float, Range(0, 1e6, "epochs")]
_Length = Annotated[float, Range(0, 1e6, "epochs", above=True)]
_Bits = Annotated[int, Range(2, 16, "bits")]

FIELDS: dict[str, Any] = {
    "seed": Annotated[int, Range(0, 2**62)],
    "epochs": _Epochs,
    "results_dir": str,
    "force": bool,
    "wait": bool,
    "prune.sparsity": Annotated[float, Range(0, 1, below=True)],
    "prune.targets": TARGETS,
    "prune.window": Annotated[int, Range(1, 10**9, "samples")],
    "prune.granularity": GRANULARITIES,
    "prune.rule": MASK_RULES,
    "prune.border": BORDERS,
    "quantize.bits": _Bits,
    "quantize.feature_bits": _Bits | None,
    "quantize.targets": TARGETS,
    "quantize.rounding": ROUNDINGS,
    "quantize.gradient": GRADIENTS,
    "quantize.saturate": Sequence[Annotated[float, Range(0, 1)]],
    "quantize.weight_axis": WEIGHT_AXES,
    "quantize.decimal": Annotated[int, Range(-64, 64, "binary digits")] | None,
    "quantize.decimal_from": str | None,
    "order.name": str,
    "order.steps": Sequence[Literal["prune", "quantize"]],
    "schedule.t_qw": _Time | None,
    "schedule.t_qf": _Time | None,
    "schedule.t_p": _Time | None,
    "schedule.dt_p": _Length | None,
    "schedule.n": Annotated[int, Range(1, 10**4, "pruning events")],
    "budget.name": str,
    "budget.epochs": _Epochs | None,
    "budget.steps_per_epoch": Annotated[int, Range(1, 10**9, "steps")] | None,
    "budget.batch_size": Samples | None,
    "budget.test_samples": Annotated[int, Range(1, 10**9, "samples")] | None,
    "data.source": ("real", "synthetic"),
    "data.root": str | None,
    "data.verify": bool,
    "trainer.device": str,
    "trainer.precision": ("float32", "bfloat16", "float16"),
    "trainer.ranks": Annotated[int, Range(1, 1024, "processes")],
    "trainer.threads": Annotated[int, Range(1, 4096, "threads")] | None,
    "trainer.keep_memory": bool | None,
    "trainer.kernels": bool,
    "trainer.channels_last": bool | None,
    "trainer.compile": bool,
    "trainer.fuse_relu": bool,
    "trainer.pack_features": bool,
    "trainer.share_stem": bool,
    "trainer.evaluate_every": _Epochs,
    "trainer.checkpoint_minutes": Annotated[float, Range(0, 1e6, "minutes")],
    "logger.name": str,
    "task._target_": str,
    "task.name": str,
    "task.sites": Mapping,
    "task.sites.quantize_weights": Sequence[str],
    "task.sites.prune_weights": Sequence[str],
    "task.sites.quantize_features": Sequence[str],
    "task.sites.prune_features": Sequence[str],
    "task.paper_size": Mapping,
    "task.paper_size.count_input": bool,
    "task.paper_size.pruned_weights": Sequence[str],
    "task.paper_size.pruned_features": Sequence[str],
    "task.paper_size.left_float": Sequence[str],
    "task.paper_size.feature_bits": _Bits | None,
}
# Keys whose absence says that there is nothing to say
_OPTIONAL = ("task.sites.", "task.paper_size.")
# They become parts of paths
_NAMES = ("order.name", "budget.name", "task.name")


def complete_fields(config: dict[str, Any]) -> None:
    """Raise UserError for a key that is missing, unknown or has an illegal value; a task's own arguments pass.

    Keys that came after a config was stored are added to it.
    """
    sections = {key.rpartition(".")[0] for key in FIELDS} - {"task"}
    for section in sorted(sections):
        values = _at(config, section) if section else config
        if values is None and section.startswith("task."):
            continue
        if not isinstance(values, Mapping):
            raise UserError(f"{section}={values!r} is not a section of keys")
        known = [key for key in FIELDS if key.rpartition(".")[0] == section]
        names = [key.rpartition(".")[2] for key in known]
        if not section:
            names += sorted({key.partition(".")[0] for key in FIELDS if "." in key})
        for name in values:
            if name not in names:
                dotted = f"{section}.{name}" if section else str(name)
                raise UserError(
                    f"{dotted} is not a key{_of(section)}{closest(str(name), names)}; legal: {', '.join(names)}"
                )
    for key, kind in FIELDS.items():
        section, _, name = key.rpartition(".")
        values = _at(config, section) if section else config
        if isinstance(values, Mapping) and name in values:
            check(key, values[name], kind)
        elif isinstance(values, dict) and key in LATER_KEYS:
            values[name] = LATER_KEYS[key]
        elif not key.startswith(_OPTIONAL):
            raise UserError(f"{key} is missing; give it a value, as configs/run.yaml and its groups do")
    for key in _NAMES:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name := _at(config, key)) or len(name) > 64:
            raise UserError(f"{key}={name!r} is not a name of at most 64 letters, digits, '_', '-' and '.'")


def _of(section: str) -> str:
    return f" of {section}" if section else " of a run's config"


def _at(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config
