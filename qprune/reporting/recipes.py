"""Names of recipes: the notation of the paper, and the keys in which runs differ, in words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from qprune.config.schema import SlotsSection
from qprune.config.signature import MACHINE_KEYS, later_at_default, without
from qprune.runs.folder import RunFolder
from qprune.runs.row import Row
from qprune.runs.store import Store

# Keys, and keys with a value, that say too little by their names
_WORDS = {
    "arithmetic": "arithmetic version",
    "order.slots=[1, 1]": "in the first slot",
    "order.slots=[1]": "in the first slot",
    "order.slots=[2, 2]": "in the second slot",
    "order.slots=[2]": "in the second slot",
    "prune.border=keep": "rim not pruned",
    "prune.border=tile": "masks tiled to the edge",
    "prune.window": "T =",
    "quantize.decimal_from": "fraction bits of run",
    "quantize.gradient=in_range": "straight-through in range",
    "quantize.gradient=ste": "straight-through gradient",
    "quantize.rounding=floor": "rounded down",
    "quantize.rounding=nearest": "rounded to the nearest",
}
_TIMES = ("schedule.t_qw", "schedule.t_qf", "schedule.t_p", "schedule.dt_p", "schedule.n")


def recipes(store: Store, rows: Sequence[Row], ignored: Sequence[str] = ()) -> dict[str, str]:
    """Name each run's recipe: its notation, and keys that distinguish it.

    Seeds, machine keys and the keys `ignored` distinguish no recipes. A key is not named where it has the value that
    most runs have.
    """
    dropped = frozenset((*MACHINE_KEYS, "seed", "order.name", *_TIMES, *ignored))
    by_notation: dict[str, dict[str, dict[str, Any]]] = {}
    names = {row.signature: f"{row.notation} (no config)" for row in rows}
    for row in rows:
        if (config := store.stored(row.signature, RunFolder.config)) is not None:
            kept = without(config, dropped.union(later_at_default(config))) | {"arithmetic": row.arithmetic}
            if slots := (kept.get("schedule") or {}).pop("slots", None):
                kept["slots"] = str(SlotsSection.model_validate(slots)).removeprefix("slots ")
            by_notation.setdefault(row.notation, {})[row.signature] = kept
    for notation, configs in by_notation.items():
        keys = differing_keys(list(configs.values()), in_words)
        names |= {name: ", ".join(filter(None, (notation, own))) for name, own in zip(configs, keys, strict=True)}
    return names


def in_words(key: str, value: str) -> str:
    """Write a key of a config and its value for a reader: T = 16, batch size 8."""
    if key == "quantize.decimal_from":
        value = value[:10]  # of a signature
    return _WORDS.get(f"{key}={value}") or f"{_WORDS.get(key) or re.sub('[._]', ' ', key)} {value}"


def differing_keys(configs: Sequence[Mapping[str, Any]], write: Callable[..., str] = "{}={}".format) -> list[str]:
    """Write for each config the keys, with values, in which it is not as most are; null is left out."""
    flat = [pd.json_normalize(dict(config)).to_dict("records")[0] for config in configs]
    texts: list[list[str]] = [[] for _ in flat]
    for key in dict.fromkeys(key for config in flat for key in config):
        values = [str(config.get(key)) for config in flat]
        [(usual, count)] = Counter(values).most_common(1)
        for text, value in zip(texts, values, strict=True):
            if value != "None" and (value != usual or 2 * count <= len(values)):
                text.append(write(key, value))
    return [", ".join(text) for text in texts]
