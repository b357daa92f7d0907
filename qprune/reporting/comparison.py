"""Which order is better: paired differences with bootstrap intervals."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from qprune.config import signature as identity
from qprune.runs.scores import unit_of_difference
from qprune.runs.store import Store

RESAMPLES = 10_000
LEVEL = 0.95
LEAST_PAIRS = 5  # with fewer, resampling the same few numbers says nothing about a further seed
ORDERS = ("prune_first", "quantize_first")


@dataclass(frozen=True)
class Comparison:
    """The two ORDERS in one setting.

    difference: mean of (prune_first - quantize_first) over `seeds`, in the score's unit. low, high: its 95 % bootstrap
    interval, None with fewer than LEAST_PAIRS seeds. better: an order, or None where no difference is shown.
    """

    task: str
    setting: str
    metric: str
    seeds: tuple[int, ...]
    difference: float
    low: float | None
    high: float | None
    better: str | None
    marks: tuple[str, ...]

    @property
    def can_decide(self) -> bool:
        """Whether there are enough seeds for an interval."""
        return len(self.seeds) >= LEAST_PAIRS

    def sentence(self) -> str:
        """Say in words what the numbers show."""
        unit = f" {unit_of_difference(self.metric) or self.metric}"
        count = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        text = f"{self.task}, {self.setting}: "
        minus = f"no difference shown ({' minus '.join(ORDERS)} is {self.difference:+.3g}{unit}"
        if self.low is None or self.high is None:
            return f"{text}{minus} over {count}; an interval needs at least {LEAST_PAIRS})"
        if self.better is None:
            return f"{text}{minus}, 95 % interval {self.low:+.3g} to {self.high:+.3g}, {count})"
        half = (self.high - self.low) / 2
        low, high = sorted((abs(self.low), abs(self.high)))
        return (
            f"{text}{self.better.replace('_', ' ')} is better by {abs(self.difference):.3g} +- {half:.2g}{unit} "
            f"(95 % interval {low:.3g} to {high:.3g}, {count})"
        )


def too_few_text(number: int) -> str:
    """Say that so many comparisons have too few seeds, instead of their sentences."""
    return f"{number} pair{'s' if number > 1 else ''} of fewer than {LEAST_PAIRS} seeds: too few to decide"


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval of the mean over resamples; deterministic."""
    numbers: npt.NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    generator, block = np.random.default_rng(0), max(1, 2**20 // len(numbers))  # a few MB at any number of values
    means = [
        numbers[generator.integers(0, len(numbers), (min(block, RESAMPLES - start), len(numbers)))].mean(axis=1)
        for start in range(0, RESAMPLES, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare_orders(store: Store) -> list[Comparison]:
    """Compare the ORDERS in every setting in which they share seeds.

    Rows are checked first; settings that cannot be paired are added to the problems of `store`.

    Returns:
        The comparisons by task, and within a task those of most seeds first: they can decide.
    """
    store.check([name for name, row in store.rows.items() if row.order in ORDERS])
    known: dict[str, str] = {}
    rows = pd.DataFrame(
        [
            (name, row.order, row.seed, row.score, _setting(store, name, known))
            for name, row in store.rows.items()
            if row.order in ORDERS
        ],
        columns=["signature", "order", "seed", "score", "setting"],
    )
    found: list[Comparison] = []
    settings: list[dict[str, Any]] = []
    for key, group in rows.groupby("setting", sort=True):
        sides = [group[group["order"] == order] for order in ORDERS]
        if repeated := [side for side in sides if side["seed"].duplicated().any()]:  # say, in two schedules
            row, seeds = store.rows[repeated[0]["signature"].iloc[0]], repeated[0]["seed"]
            store.problems.append(
                f"{row.task} {row.notation}: several runs of seed {seeds[seeds.duplicated()].iloc[0]} differ only in "
                "their schedule; they are not compared"
            )
        elif len(pairs := sides[0].merge(sides[1], on="seed", suffixes=("_first", "_second")).sort_values("seed")):
            found.append(_comparison(store, pairs))
            settings.append(json.loads(str(key))[-1])
    alike: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(found):
        alike.setdefault((one.task, one.setting), []).append(place)
    for places in alike.values():
        for place, keys in zip(places, differing_keys([settings[place] for place in places]), strict=True):
            found[place] = replace(found[place], setting=", ".join(filter(None, (found[place].setting, keys))))
    return sorted(found, key=lambda one: (one.task, -len(one.seeds)))


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write for each config the keys, with values, in which it is not as most are."""
    flat = [pd.json_normalize(dict(config)).to_dict("records")[0] for config in configs]
    texts: list[list[str]] = [[] for _ in flat]
    for key in dict.fromkeys(key for config in flat for key in config):
        values = [str(config.get(key)) for config in flat]
        [(usual, count)] = Counter(values).most_common(1)
        for text, value in zip(texts, values, strict=True):
            if value != usual or 2 * count <= len(values):
                text.append(f"{key}={value}")
    return [", ".join(text) for text in texts]


def _comparison(store: Store, pairs: pd.DataFrame) -> Comparison:
    names = [*pairs["signature_first"], *pairs["signature_second"]]
    row = store.rows[names[0]]
    differences = (pairs["score_first"] - pairs["score_second"]).tolist()
    low, high = bootstrap_interval(differences) if len(pairs) >= LEAST_PAIRS else (None, None)
    better = None
    if low is not None and high is not None and (low > 0 or high < 0):
        better = ORDERS[0] if (low > 0) == row.higher_is_better else ORDERS[1]
    setting = f"{' and '.join(sorted(row.notation.split('->')))} ({row.budget}, {row.data_source} data)"
    seeds, difference = tuple(pairs["seed"].tolist()), float(np.mean(differences))
    marks = tuple(dict.fromkeys(mark for name in names for mark in store.rows[name].marks))
    return Comparison(row.task, setting, row.metric, seeds, difference, low, high, better, marks)


def _setting(store: Store, signature: str, known: dict[str, str]) -> str:
    """Return what the runs of a pair share: config but order, schedule and seed.

    known: by the text of config files without the line of the seed. Parsing each file would take ten times as long
    as the rest.
    """
    row = store.rows[signature]
    before, _, after = f"\n{store.folders[signature].config_text() or ''}".partition("\nseed: ")
    text = (before + after[after.find("\n") :]).strip()
    if text and text in known:
        return known[text]
    config = store.folders[signature].config()
    shared: dict[str, Any] = {"recipe": sorted(row.notation.split("->")), "epochs": row.epochs, "steps": row.steps}
    if config is not None:
        shared = {k: v for k, v in config.items() if k not in ("order", "schedule", "seed")}
        later = identity.later_at_default(shared)
        shared = identity.without(shared, frozenset((*identity.MACHINE_KEYS, *later)))
    known[text] = json.dumps([row.task, row.metric, row.budget, row.data_source, shared], sort_keys=True)
    return known[text]
