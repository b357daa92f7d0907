"""What names a run: the keys that count, their signature, the run's folder and its recipe as the paper writes it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Config keys that say where and how a run is carried out; all others are part of its identity.
MACHINE_KEYS = (
    "data.root",
    "force",
    "hydra",
    "logger",
    "results_dir",
    "trainer.checkpoint_minutes",
    "trainer.device",
    "trainer.evaluate_every",
    "trainer.fuse_relu",
    "trainer.keep_memory",
    "trainer.kernels",
    "trainer.pack_features",
    "trainer.share_stem",
    "trainer.threads",
    "wait",
)
# Keys that came after runs had been stored, with what held before them: rows without them stay what they are, and
# configs without them are completed (see fields.py).
LATER_KEYS: dict[str, Any] = {
    "quantize.decimal_from": None,
    "task.further_test_folders": [],
    "trainer.channels_last": None,
    "trainer.compile": False,
    "trainer.fuse_relu": False,
    "trainer.kernels": True,
    "trainer.pack_features": False,
    "trainer.share_stem": True,
    "wait": False,
}


def signature(cfg: DictConfig) -> str:
    """The identity of a run: sha256, in hexadecimal, of the resolved config without machine keys.

    The order of keys and the spelling of whole numbers (200 or 200.0) make no difference, nor do keys of operators
    that the order does not use: a baseline is the same run at any number of bits.
    """
    return digest(identity(cfg))


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What the signature stands for: the resolved config without machine keys and unused ones, in canonical form."""
    unused = (*_unused_keys(cfg.order.steps), *later_at_default(cfg))
    return dict(without(OmegaConf.to_container(cfg, resolve=True), frozenset((*MACHINE_KEYS, *unused))))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as dicts, lists and values that JSON knows, which a task may change or pickle."""
    config: dict[str, Any] = json.loads(json.dumps(OmegaConf.to_container(cfg, resolve=True)))
    return config


def later_at_default(config: Mapping[Any, Any]) -> tuple[str, ...]:
    """Those of LATER_KEYS at which a config has what held before them, be they there or not."""
    return tuple(key for key, default in LATER_KEYS.items() if _value(config, key, default) == default)


def _value(config: Any, key: str, default: Any) -> Any:
    for name in key.split("."):
        if name not in config:
            return default
        config = config[name]
    return config


def digest(kept: dict[str, Any]) -> str:
    """sha256, in hexadecimal, of an `identity`."""
    return digest_of_text(_text(kept))


def digest_of_text(text: str) -> str:
    """As `digest`, of the text that stands for an identity."""
    return hashlib.sha256(text.encode()).hexdigest()


def around_seed(kept: dict[str, Any]) -> tuple[str, str]:
    """The text that stands for an identity before and after its seed: runs differ in it by the thousand."""
    mark = "\0"  # which no config holds
    before, _, after = _text(kept | {"seed": mark}).partition(json.dumps(mark))
    return before, after


def _text(kept: dict[str, Any]) -> str:
    return json.dumps(kept, sort_keys=True, allow_nan=False)


def _unused_keys(order: Sequence[str]) -> tuple[str, ...]:
    """Keys that have no effect without their operator. T (prune.window) is the quantizers' too."""
    unused: tuple[str, ...] = ()
    if "prune" not in order:
        names = ("sparsity", "targets", "granularity", "rule", "border", *(() if "quantize" in order else ("window",)))
        unused += (*(f"prune.{name}" for name in names), "schedule.t_p", "schedule.dt_p", "schedule.n")
    if "quantize" not in order:
        unused += ("quantize", "schedule.t_qw", "schedule.t_qf")
    return unused


def run_folder(cfg: DictConfig) -> Path:
    """Where the files of the run are: below results_dir, named for people, made unique by the signature."""
    recipe = [re.sub("[^0-9A-Za-z.]", "", notation([step], cfg.prune, cfg.quantize)) for step in cfg.order.steps]
    name = "-".join([cfg.order.name, *recipe, f"seed{cfg.seed}", signature(cfg)[:10]])
    return Path(cfg.results_dir, cfg.task.name, name)


def notation(order: Iterable[str], prune: Mapping[str, Any], quantize: Mapping[str, Any]) -> str:
    """The recipe as the paper writes it: `P0.5(w,f)->Q8(w,f)`, `Q8(w),Q12(f)`, or `Baseline` for no operator.

    order: of `prune` and `quantize`. prune, quantize: those sections of the config, resolved.
    """
    terms = {"prune": lambda: _pruning(prune), "quantize": lambda: _quantization(quantize)}
    return "->".join(terms[step]() for step in order) or "Baseline"


def _pruning(options: Mapping[str, Any]) -> str:
    return f"P{options['sparsity']:g}({','.join(options['targets'])})"


def _quantization(options: Mapping[str, Any]) -> str:
    bits = {"w": options["bits"], "f": options.get("feature_bits") or options["bits"]}
    targets = options["targets"]
    if len({bits[target] for target in targets}) == 1:
        return f"Q{bits[targets[0]]}({','.join(targets)})"
    return ",".join(f"Q{bits[target]}({target})" for target in targets)


def without(value: Any, dropped: frozenset[str], path: str = "") -> Any:
    """`value` in canonical form, without the keys whose dotted path is in `dropped`."""
    if isinstance(value, dict):
        inner = {str(key): (f"{path}.{key}" if path else str(key)) for key in value}
        return {str(k): without(v, dropped, inner[str(k)]) for k, v in value.items() if inner[str(k)] not in dropped}
    if isinstance(value, list):
        return [without(item, dropped, path) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
