"""What names a run: signature, folder, and recipe as the paper writes it."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qprune.config.schema import LATER_KEYS, PruneSection, RunConfig
from qprune.config.schema import MACHINE_KEYS as MACHINE_KEYS

Config = RunConfig | Mapping[str, Any] | DictConfig  # resolved or to be resolved


def signature(config: Config) -> str:
    """Return what names a run: the sha256, in hexadecimal, of its `identity`.

    The order of keys and the spelling of whole numbers (200 or 200.0) make no difference, nor do keys of operators
    that the order does not use: a baseline is the same run at any number of bits.
    """
    return hashlib.sha256(identity_text(config).encode()).hexdigest()


def identity_text(config: Config) -> str:
    """Return the `identity` of a config as JSON with sorted keys."""
    return json.dumps(identity(config), sort_keys=True, allow_nan=False)


def identity(config: Config) -> dict[str, Any]:
    """Return a config in canonical form, without the keys that make no difference."""
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


def short_hash(texts: Iterable[str]) -> str:
    """Return ten hexadecimal digits that stand for texts, whatever their order."""
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:10]


def _unused_keys(order: Sequence[str]) -> tuple[str, ...]:
    """List the keys without effect in an order; T is the quantizers' too."""
    unused: tuple[str, ...] = ()
    if "prune" not in order:
        names = PruneSection.model_fields.keys() - ({"window"} if "quantize" in order else set())
        unused += (*(f"prune.{name}" for name in names), "schedule.t_p", "schedule.dt_p", "schedule.n")
    if "quantize" not in order:
        unused += ("quantize", "schedule.t_qw", "schedule.t_qf")
    return unused if order else (*unused, "schedule.slots", "order.slots")


def run_folder(config: Config) -> Path:
    """Return a run's folder: named for people, made unique by the signature."""
    values = as_dict(config)
    order = values["order"]
    recipe = [re.sub("[^0-9A-Za-z.]", "", notation(values, [step])) for step in order["steps"]]
    name = "-".join([order["name"], *recipe, f"seed{values['seed']}", signature(values)[:10]])
    return Path(values["results_dir"], values["task"]["name"], name)


def notation(config: Config, steps: Iterable[str] | None = None) -> str:
    """Write a recipe, or `steps` of it, as the paper does: `P0.5(w,f)->Q8(w,f)`; `+` joins what shares a slot."""
    values = as_dict(config)
    writers = {"prune": _pruning, "quantize": _quantization}
    steps = values["order"]["steps"] if steps is None else steps
    slots = values["order"].get("slots") or (1, 2)
    return ("->" if len(set(slots)) > 1 else "+").join(writers[step](values[step]) for step in steps) or "Baseline"


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
