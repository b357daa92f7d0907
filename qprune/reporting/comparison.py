"""Which order is better: differences of paired seeds within a protocol, and what time alone predicts of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from qprune.config import signature as identity
from qprune.config.schema import SlotsSection
from qprune.errors import UserError, counted
from qprune.reporting.recipes import differing_keys, in_words
from qprune.reporting.statistics import LEAST_PAIRS, UNTESTED, Tested, table_of
from qprune.runs.folder import RunFolder
from qprune.runs.row import Row
from qprune.runs.scores import unit_of_difference
from qprune.runs.store import Store, versions_text

METHOD = (
    "Differences are paired by seed; intervals are 95 % t intervals of the mean. A verdict needs six seeds, and both a "
    "paired t test, after Holm's correction over the comparisons of its table, and the exact sign-flip test at 5 %. "
    "Equality is shown by two one-sided t tests against a margin, where one is given, corrected likewise."
)
PROTOCOLS = ("paper", "mirrored", "factorial")
ORDERS = ("prune_first", "quantize_first")
_EVENTS = ("pruning", "quantization")
_BOTH, _PRUNE, _QUANTIZE = ["prune", "quantize"], ["prune"], ["quantize"]
# The runs of the factorial protocol, with the operators that each has
_CELLS = {
    **dict.fromkeys((*ORDERS, "joint", "joint_late"), _BOTH),
    **dict.fromkeys(("prune_only", "prune_only_late"), _PRUNE),
    **dict.fromkeys(("quantize_only", "quantize_only_late"), _QUANTIZE),
}


@dataclass(frozen=True)
class Contrast:
    """A sum of scores, weighted by order. above, below: what is shown where it is better, or worse, than zero."""

    name: str
    weights: Mapping[str, float]
    above: str
    below: str


_DIFFERENCE = {"prune_first": 1.0, "quantize_first": -1.0}
_TIME = {"prune_only": 1.0, "prune_only_late": -1.0, "quantize_only": -1.0, "quantize_only_late": 1.0}
ORDER = Contrast("prune first minus quantize first", _DIFFERENCE, "prune first is better", "quantize first is better")
FACTORIAL = (
    Contrast(
        "what time alone predicts of it, (P early - P late) - (Q early - Q late)",
        _TIME,
        "time alone favors prune first",
        "time alone favors quantize first",
    ),
    Contrast(
        "their interaction, the difference minus what time alone predicts",
        _DIFFERENCE | {order: -weight for order, weight in _TIME.items()},
        "the order itself favors prune first",
        "the order itself favors quantize first",
    ),
    Contrast(
        "mean of both orders minus mean of joint and joint_late",
        {"prune_first": 0.5, "quantize_first": 0.5, "joint": -0.5, "joint_late": -0.5},
        "one operator after the other is better than both at once",
        "both operators at once are better than one after the other",
    ),
)


@dataclass(frozen=True)
class Comparison:
    """A contrast in one setting, over seeds.

    table: what stands in one table shares Holm's correction. config: what its runs share. better_above: whether a
    higher score is better. recovery: the training left after the last events. margin: the difference that would
    matter; None: it was not chosen.
    """

    task: str
    table: str
    setting: str
    config: Mapping[str, Any]
    metric: str
    contrast: Contrast
    better_above: bool
    values: pd.Series[float]  # by seed
    recovery: str
    marks: tuple[str, ...]
    tested: Tested = UNTESTED
    margin: float | None = None

    @property
    def heading(self) -> str:
        """What the comparisons of one table have in common."""
        return f"{self.task}, {self.table}"

    @property
    def can_decide(self) -> bool:
        """Whether there are enough seeds for a verdict."""
        return self.tested.can_decide

    @property
    def verdict(self) -> str:
        """What is shown, in words."""
        if not self.can_decide:
            return f"too few seeds, a verdict needs {LEAST_PAIRS}"
        near = "" if self.margin is None else f"{self.margin:g}{self._unit}"
        if not self.tested.differs:
            return f"no difference of {near} or more" if self.tested.equal else "undecided"
        is_better = (self.tested.mean > 0) == self.better_above
        shown = self.contrast.above if is_better else self.contrast.below
        return f"{shown}, by less than {near}" if self.tested.equal else shown

    @property
    def _unit(self) -> str:
        return f" {unit_of_difference(self.metric) or self.metric}"

    def sentence(self) -> str:
        """Say what is shown, with the numbers that it rests on."""
        numbers = self.tested.numbers(self._unit)
        return f"{self.setting}: {self.verdict} ({self.contrast.name} is {numbers}){self.recovery}"


def too_few_text(number: int) -> str:
    """Say that so many comparisons have too few seeds, instead of their sentences."""
    return f"{counted(number, 'comparison')} of fewer than {LEAST_PAIRS} seeds: too few to decide"


def compare_orders(
    store: Store, protocol: str | None = None, margin: float | None = None, **wanted: str
) -> list[Comparison]:
    """Compare the ORDERS in every setting in which they share seeds.

    Rows are checked first; settings that cannot be paired are added to the problems of `store`. Runs with times of
    their own (`paper`) are compared with each other, as are runs in the same slots (`mirrored`, `factorial`).

    Args:
        store: The runs.
        protocol: One of PROTOCOLS; None: all.
        margin: The difference that would matter, in the score's unit; None: equality is not tested.
        wanted: Fields of rows and their values, such as task="espcn"; all rows by default.

    Returns:
        The comparisons by table, and within a table those of most seeds first.
    """
    chosen = [
        name
        for name, row in store.rows.items()
        if row.order in _CELLS and all(getattr(row, key) == value for key, value in wanted.items())
    ]
    store.check(chosen)
    runs = _runs(store, [name for name in chosen if name in store.rows])
    found: list[Comparison] = []
    for setting, group in runs[runs["order"].isin(ORDERS)].groupby("setting", sort=True):
        same = runs["setting"].isin([setting, *group["prune"], *group["quantize"]])
        found += _contrasts(store, runs[same], protocol)
    _tell_apart(found)
    found.sort(key=lambda one: (one.heading, -len(one.values)))
    compared = []
    for _, of_table in itertools.groupby(found, key=lambda one: one.heading):
        table = list(of_table)
        tests = table_of([one.values.tolist() for one in table], margin)
        compared += [replace(one, tested=tested, margin=margin) for one, tested in zip(table, tests, strict=True)]
    return compared


def _tell_apart(found: list[Comparison]) -> None:
    """Add to settings that would read alike the keys in which they differ."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for place, one in enumerate(found):
        alike.setdefault((one.task, one.table, one.setting, one.contrast.name), []).append(place)
    for places in alike.values():
        for place, keys in zip(places, differing_keys([found[i].config for i in places], in_words), strict=True):
            if keys:
                found[place] = replace(found[place], setting=f"{found[place].setting}, {keys}")


def _runs(store: Store, names: Sequence[str]) -> pd.DataFrame:
    """Return order, seed, score, version of the arithmetic and settings of runs, by signature.

    `setting` is that of the run; `prune` and `quantize` are the same with one operator.
    """
    known: dict[str, dict[str, str]] = {}
    lines: dict[str, dict[str, Any]] = {}
    for name in names:
        row, folder = store.rows[name], store.folders[name]
        before, _, after = f"\n{store.stored(name, RunFolder.config_text) or ''}".partition("\nseed: ")
        text = before + after[after.find("\n") :]  # parsing every file would take ten times as long as the rest
        if text not in known or not text.strip():
            try:
                known[text] = _settings(row, folder.config())
            except UserError as error:
                store.problems.append(str(error))
                del store.rows[name]
                continue
        line = {"order": row.order, "seed": row.seed, "score": row.score, "arithmetic": row.arithmetic}
        lines[name] = line | known[text]
    columns = ["order", "seed", "score", "arithmetic", "setting", "prune", "quantize"]
    return pd.DataFrame(list(lines.values()), columns=columns, index=list(lines))


def _settings(row: Row, config: Mapping[str, Any] | None) -> dict[str, str]:
    """Write, as JSON, what runs that are compared share: config but order, times and seed."""
    found = {}
    for name, operators in (("setting", _CELLS[row.order]), ("prune", _PRUNE), ("quantize", _QUANTIZE)):
        shared: dict[str, Any] = {"recipe": sorted(row.notation.split("->")), "epochs": row.epochs, "steps": row.steps}
        slots = ""
        if config is not None:
            shared = identity.identity({**config, "order": {"name": "", "steps": operators}})
            schedule = shared.pop("schedule")
            del shared["order"], shared["seed"]
            if schedule.get("slots"):
                slots = str(SlotsSection.model_validate(schedule["slots"]))
                shared["schedule"] = {"n": schedule["n"]} if "n" in schedule else {}
        found[name] = json.dumps([row.task, row.metric, row.budget, row.data_source, slots, shared], sort_keys=True)
    return found


def _contrasts(store: Store, runs: pd.DataFrame, protocol: str | None) -> Iterator[Comparison]:
    """Iterate over the comparisons of one setting. Runs that cannot be paired add a problem."""
    in_orders = runs["order"].isin(ORDERS)
    *_, slots, shared = json.loads(runs.loc[in_orders, "setting"].iloc[0])
    if protocol is not None and (protocol == "paper") == bool(slots):
        return
    paired = runs[in_orders].groupby(["arithmetic", "seed"])["order"].nunique() == len(ORDERS)
    if not paired.any():
        return
    version = max(paired[paired].index.get_level_values("arithmetic"))
    left_out = versions_text(runs.loc[in_orders & (runs["arithmetic"] != version), "arithmetic"])
    runs = runs[(runs["arithmetic"] == version) & (in_orders | bool(slots))]
    row = store.rows[str(runs.index[runs["order"] == ORDERS[0]][0])]
    if (twice := runs.duplicated(["order", "seed"])).any():  # say, in two schedules
        row = store.rows[str(runs.index[twice][0])]
        text = f"{row.task} {row.notation}: several runs of seed {row.seed} differ only in their schedule"
        store.problems.append(f"{text}; they are not compared")
        return
    scores = runs.pivot(index="seed", columns="order", values="score")
    found = [each for each in (ORDER, *FACTORIAL) if set(each.weights) <= set(scores) and (slots or each is ORDER)]
    table = f"{slots} ({'factorial' if found[1:] else 'mirrored'} protocol)" if slots else "times of each order's own"
    setting = f"{' and '.join(sorted(row.notation.split('->')))} ({row.budget}, {row.data_source} data)"
    for contrast in found if protocol != "mirrored" else found[:1]:
        weights = pd.Series(contrast.weights)
        values = scores[weights.index].mul(weights).sum(axis=1, skipna=False).dropna()
        if values.empty:
            continue
        names = runs.index[runs["order"].isin(weights.index) & runs["seed"].isin(values.index)]
        every = dict.fromkeys(mark for name in names for mark in store.rows[name].marks)
        marks = [mark for mark in every if not slots or slots not in mark]
        recovery = _recovery_text(store, runs[runs["seed"] == values.index[0]]) if contrast is ORDER else ""
        head = row.task, table, setting, shared, row.metric, contrast, row.higher_is_better
        yield Comparison(*head, values, recovery, (*marks, *left_out))


def _recovery_text(store: Store, runs: pd.DataFrame) -> str:
    """Say how much training each of the ORDERS has left after its events."""
    texts = []
    for order in ORDERS:
        left = store.recovery(str(runs.index[runs["order"] == order][0]))
        if len(left) == 4:
            epochs, rates = ([left[f"{kind}_after_{name}"] for name in _EVENTS] for kind in ("epochs", "rates"))
            text = f"{epochs[0]:.3g} and {epochs[1]:.3g} epochs (rates {rates[0]:.3g} and {rates[1]:.3g})"
            texts.append(f"{order.replace('_', ' ')} {text}")
    return f"; left after the last pruning and quantization: {', '.join(texts)}" if len(texts) == 2 else ""
