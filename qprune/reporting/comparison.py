"""Which order is better: paired differences over the same seeds, with bootstrap intervals and plain sentences."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from qprune.config import signature as identity
from qprune.reporting.units import unit_of_difference
from qprune.runs.store import Store

RESAMPLES = 10_000
LEVEL = 0.95
LEAST_PAIRS = 5  # with fewer, resampling the same few numbers says nothing about a further seed
ORDERS = ("prune_first", "quantize_first")


@dataclass(frozen=True)
class Comparison:
    """Two orders of one setting. difference: mean of (first - second) over `seeds`, in the score's unit; low, high:
    its 95 % bootstrap interval (None with fewer than LEAST_PAIRS seeds). better: an order, or None for none shown."""

    task: str
    setting: str
    metric: str
    first: str
    second: str
    seeds: tuple[int, ...]
    difference: float
    low: float | None
    high: float | None
    better: str | None
    marks: tuple[str, ...]

    @property
    def can_decide(self) -> bool:
        """Whether there are seeds enough for an interval."""
        return len(self.seeds) >= LEAST_PAIRS

    def sentence(self) -> str:
        """What the numbers say, in words."""
        unit, n = f" {unit_of_difference(self.metric) or self.metric}", len(self.seeds)
        count = f"{n} seed{'s' if n > 1 else ''}"
        text = f"{self.task}, {self.setting}: "
        if self.low is None or self.high is None:
            return (
                f"{text}no difference shown ({self.first} minus {self.second} is {self.difference:+.3g}{unit} over "
                f"{count}; an interval needs at least {LEAST_PAIRS})"
            )
        if self.better is None:
            return (
                f"{text}no difference shown ({self.first} minus {self.second} is {self.difference:+.3g}{unit}, 95 % "
                f"interval {self.low:+.3g} to {self.high:+.3g}, {count})"
            )
        half = (self.high - self.low) / 2
        low, high = sorted((abs(self.low), abs(self.high)))
        return (
            f"{text}{self.better.replace('_', ' ')} is better by {abs(self.difference):.3g} +- {half:.2g}{unit} "
            f"(95 % interval {low:.3g} to {high:.3g}, {count})"
        )


def too_few_text(number: int) -> str:
    """What is said of so many comparisons that cannot decide, instead of their sentences."""
    return f"{number} pair{'s' if number > 1 else ''} of fewer than {LEAST_PAIRS} seeds: too few to decide"


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of the mean of `values` over resamples with replacement; the same for the same values."""
    numbers: npt.NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    chance, block = np.random.default_rng(0), max(1, 2**20 // len(numbers))  # a few MB at any number of values
    means = [
        numbers[chance.integers(0, len(numbers), (min(block, RESAMPLES - start), len(numbers)))].mean(axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare_orders(store: Store, orders: Sequence[str] = ORDERS) -> list[Comparison]:
    """Every pair of `orders` in every setting that two of them share seeds in; rows are checked first.

    By task, and within one those of most seeds first: they can decide.
    """
    store.check([name for name, row in store.rows.items() if row.order in orders])
    known: dict[str, str] = {}
    rows = pd.DataFrame(
        [
            {
                "signature": name,
                "order": row.order,
                "seed": row.seed,
                "score": row.score,
                "key": _setting(store, name, known),
            }
            for name, row in store.rows.items()
            if row.order in orders
        ],
        columns=["signature", "order", "seed", "score", "key"],
    )
    found, keys = [], []
    for key, group in rows.groupby("key", sort=True):
        for first, second in itertools.combinations(orders, 2):
            sides = [group[group["order"] == order] for order in (first, second)]
            for side in sides:  # one setting in two variants (say, of the schedule) cannot be paired by seed
                twice = side.loc[side["seed"].duplicated(), "seed"]
                if len(twice):
                    row = store.rows[side["signature"].iloc[0]]
                    store.problems.append(
                        f"{row.task} {row.notation}: several runs of seed {twice.iloc[0]} differ only in their "
                        "schedule; they are not compared"
                    )
                    break
            else:
                pairs = sides[0].merge(sides[1], on="seed", suffixes=("_first", "_second")).sort_values("seed")
                if len(pairs):
                    found.append(_comparison(store, pairs, first, second))
                    keys.append(str(key))
    told = [replace(one, setting=one.setting + more) for one, more in zip(found, _apart(found, keys), strict=True)]
    return sorted(told, key=lambda one: (one.task, -len(one.seeds)))


def _apart(found: Sequence[Comparison], keys: Sequence[str]) -> list[str]:
    """For comparisons whose settings read the same: the config keys that set them apart, with their values."""
    settings = [json.loads(key)[-1] for key in keys]
    flat = pd.json_normalize([setting if isinstance(setting, dict) else {} for setting in settings]).map(str)
    more: list[str] = []
    for one, (_, own) in zip(found, flat.iterrows(), strict=True):
        alike = flat[[other.setting == one.setting and other.task == one.task for other in found]]
        more.append("".join(f", {name}={own[name]}" for name in flat.columns if alike[name].nunique() > 1))
    return more


def _comparison(store: Store, pairs: pd.DataFrame, first: str, second: str) -> Comparison:
    row = store.rows[pairs["signature_first"].iloc[0]]
    differences = (pairs["score_first"] - pairs["score_second"]).tolist()
    low, high = bootstrap_interval(differences) if len(pairs) >= LEAST_PAIRS else (None, None)
    better = None
    if low is not None and high is not None and (low > 0 or high < 0):
        better = first if (low > 0) == row.higher_is_better else second
    names = [*pairs["signature_first"], *pairs["signature_second"]]
    return Comparison(
        task=row.task,
        setting=f"{' and '.join(sorted(row.notation.split('->')))} ({row.budget}, {row.data_source} data)",
        metric=row.metric,
        first=first,
        second=second,
        seeds=tuple(pairs["seed"].tolist()),
        difference=float(np.mean(differences)),
        low=low,
        high=high,
        better=better,
        marks=tuple(dict.fromkeys(mark for name in names for mark in store.rows[name].marks)),
    )


def _setting(store: Store, signature: str, known: dict[str, str]) -> str:
    """What two runs of one pair share: the config but for order, schedule and seed; without its file, the notation.

    known: settings by the text of config files, but for the line of the seed: reading each file anew takes ten times
    as long as the rest.
    """
    row = store.rows[signature]
    before, _, after = f"\n{store.config_text(signature) or ''}".partition("\nseed: ")
    text = (before + after[after.find("\n") :]).strip()
    if text and text in known:
        return known[text]
    config = store.config(signature)
    shared: Any = [sorted(row.notation.split("->")), row.epochs, row.steps]
    if config is not None:
        shared = {k: v for k, v in config.items() if k not in ("order", "schedule", "seed")}
        later = identity.later_at_default(shared)
        shared = identity.without(shared, frozenset((*identity.MACHINE_KEYS, *later)))
    known[text] = json.dumps([row.task, row.metric, row.budget, row.data_source, shared], sort_keys=True)
    return known[text]
