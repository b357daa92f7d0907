"""What names a run: signature, folder, and recipe as the paper writes it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qprune.config.schema import LATER_KEYS, RunConfig
from qprune.config.schema import MACHINE_KEYS as MACHINE_KEYS

Config = RunConfig | Mapping[str, Any] | DictConfig  # resolved or to be resolved


def signature(config: Config) -> str:
    """Return what names a run: the sha256, in hexadecimal, of its `identity`.

    The order of keys and the spelling of whole numbers (200 or 200.0) make no difference, nor do keys of operators
    that the order does not use: a baseline is the same run at any number of bits.
    """
    return digest(identity(config))


def identity(config: Config) -> dict[str, Any]:
    """Return the part of a config that makes the run what it is, canonically.

    Machine keys, keys of unused operators, and later keys at their defaults are left out.
    """
    values = as_dict(config)
    unused = (*_unused_keys(values["order"]["steps"]), *later_at_default(values))
    return dict(without(values, frozenset((*MACHINE_KEYS, *unused))))


def as_dict(config: Config) -> dict[str, Any]:
    """Return a config as resolved dicts and lists."""
    if isinstance(config, RunConfig):
        return config.plain()
    if isinstance(config, DictConfig):
        values = OmegaConf.to_container(config, resolve=True)
        assert isinstance(values, dict)
        return {str(key): value for key, value in values.items()}
    return dict(config)


def later_at_default(config: Mapping[Any, Any]) -> tuple[str, ...]:
    """List the later keys that a config lacks or has at their defaults."""
    return tuple(key for key, default in LATER_KEYS.items() if _value(config, key, default) == default)


def _value(config: Any, key: str, default: Any) -> Any:
    for name in key.split("."):
        if name not in config:
            return default
        config = config[name]
    return config


def digest(kept: Any) -> str:
    """Return the sha256, in hexadecimal, of plain values such as an `identity`."""
    return hashlib.sha256(json.dumps(kept, sort_keys=True, allow_nan=False).encode()).hexdigest()


def short_hash(texts: Iterable[str]) -> str:
    """Return ten hexadecimal digits that stand for texts, whatever their order."""
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:10]


def _unused_keys(order: Sequence[str]) -> tuple[str, ...]:
    """List the keys without effect in an order; T is the quantizers' too."""
    unused: tuple[str, ...] = ()
    if "prune" not in order:
        names = ("sparsity", "targets", "granularity", "rule", "border", *(() if "quantize" in order else ("window",)))
        unused += (*(f"prune.{name}" for name in names), "schedule.t_p", "schedule.dt_p", "schedule.n")
    if "quantize" not in order:
        unused += ("quantize", "schedule.t_qw", "schedule.t_qf")
    return unused


def run_folder(config: Config) -> Path:
    """Return a run's folder: named for people, made unique by the signature."""
    values = as_dict(config)
    order = values["order"]
    recipe = [re.sub("[^0-9A-Za-z.]", "", notation(values, [step])) for step in order["steps"]]
    name = "-".join([order["name"], *recipe, f"seed{values['seed']}", signature(values)[:10]])
    return Path(values["results_dir"], values["task"]["name"], name)


def notation(config: Config, steps: Iterable[str] | None = None) -> str:
    """Write a recipe as the paper does: `P0.5(w,f)->Q8(w,f)`, or `Baseline`.

    steps: some of the order's steps; all of them by default.
    """
    values = as_dict(config)
    terms = {"prune": lambda: _pruning(values["prune"]), "quantize": lambda: _quantization(values["quantize"])}
    steps = values["order"]["steps"] if steps is None else steps
    return "->".join(terms[step]() for step in steps) or "Baseline"


def _pruning(options: Mapping[str, Any]) -> str:
    return f"P{options['sparsity']:g}({','.join(options['targets'])})"


def _quantization(options: Mapping[str, Any]) -> str:
    bits = {"w": options["bits"], "f": options.get("feature_bits") or options["bits"]}
    targets = options["targets"]
    if len({bits[target] for target in targets}) == 1:
        return f"Q{bits[targets[0]]}({','.join(targets)})"
    return ",".join(f"Q{bits[target]}({target})" for target in targets)


def without(value: Any, dropped: frozenset[str], path: str = "") -> Any:
    """Return `value` in canonical form, without the dotted keys in `dropped`."""
    if isinstance(value, dict):
        inner = {str(key): (f"{path}.{key}" if path else str(key)) for key in value}
        return {str(k): without(v, dropped, inner[str(k)]) for k, v in value.items() if inner[str(k)] not in dropped}
    if isinstance(value, list):
        return [without(item, dropped, path) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
