"""What `qprune frontier` is asked, read from its words: the models of the grid, their runs, and the question."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override

from qprune.config import signature as identity
from qprune.config.compose import Composer, values_of
from qprune.config.schema import RunConfig
from qprune.errors import UserError, one_of
from qprune.reporting.units import unit_of_difference
from qprune.runs.folder import PUBLISHED, ROW_FILE, RunFolder
from qprune.runs.jobs import Job, expand
from qprune.runs.store import Store
from qprune.search.frontier import FLOAT_BITS, Amount, Point, Question, in_order

ALIASES = {"bits": "quantize.bits", "sparsity": "prune.sparsity"}
DEFAULTS = {"quantize.bits": "3,4,6,8", "prune.sparsity": "0,0.25,0.5,0.75", "seed": "0", "order": "prune_first"}
OWN_KEYS = ("max_loss", "max_size", "margin", "stop")
STOP = ("early", "never")
Run = tuple[Point, int]  # a model and a seed


@dataclass(frozen=True)
class Grid:
    """The models in the order in which they are tried, their runs by seed, and what is asked of them.

    orders, configs: by model; a config is that of the first seed. stops: whether runs are stopped early.
    exhaustive: whether every run is carried out to its end.
    """

    points: list[Point]
    seeds: list[int]
    jobs: dict[Run, Job]
    orders: dict[Point, str]
    configs: dict[Point, RunConfig]
    question: Question
    metric: str
    stops: bool
    exhaustive: bool

    @property
    def results_dir(self) -> Path:
        """The folder above all run folders."""
        return Path(next(iter(self.configs.values())).results_dir)

    @property
    def task(self) -> str:
        """The task's name."""
        return next(iter(self.configs.values())).task.name

    @property
    def unit(self) -> str:
        """The unit of a difference of scores, with a blank before it; empty for a metric without unit."""
        unit = unit_of_difference(self.metric)
        return f" {unit}" if unit else ""


@dataclass(frozen=True)
class _Model:
    """A cell of the grid in one family, or several that share it: the overrides of its runs but the seed."""

    words: tuple[str, ...]
    families: frozenset[str]
    bits: int
    sparsity: float
    note: str  # values of further keys that vary


def grid_of(arguments: Sequence[str], config_dir: str | None = None, exhaustive: bool = False) -> Grid:
    """The grid that these words ask for. Raises UserError for what is wrong with them; nothing is written."""
    own, overrides = _separated(expand(arguments, config_dir))
    with Composer(config_dir) as composer:
        values = {override.key_or_group: _values(override) for override in composer.parse(overrides)}
        for key, text in DEFAULTS.items():
            values.setdefault(key, _values(composer.parse([f"{key}={text}"])[0]))
        seeds = [
            _number(text, "seed", "a whole number >= 0", lambda n: n >= 0 and n == int(n)) for text in values["seed"]
        ]
        models = _models(composer, values, prefixes={o.key_or_group: _prefix(o) for o in composer.parse(overrides)})
        from qprune.config.build import Recipe  # late: both import torch, which bad input need not wait for
        from qprune.search.size import Sizer

        sizer, found = Sizer(), {}
        for model in models:
            configs = {int(seed): composer.checked([*model.words, f"seed={int(seed)}"]) for seed in seeds}
            found[_point(sizer, model, Recipe.from_config(configs[int(seeds[0])]))] = (model, configs)
    recipes = {point: Recipe.from_config(configs[int(seeds[0])]) for point, (_, configs) in found.items()}
    task = sizer.task(next(iter(recipes.values())))
    points = in_order(found)
    signatures = {(p, s): identity.signature(config) for p, (_, of) in found.items() for s, config in of.items()}
    stored = _stored(Path(next(iter(recipes.values())).config.results_dir), signatures.values())
    jobs = {}
    for point in points:
        model, configs = found[point]
        for seed, config in configs.items():
            folder = identity.run_folder(config)
            if not (folder / ROW_FILE).exists():
                folder = stored.get(signatures[point, seed], folder)
            jobs[point, seed] = Job((*model.words, f"seed={seed}"), config, folder, *RunFolder(folder).state())
    return Grid(
        points=points,
        seeds=list(dict.fromkeys(int(seed) for seed in seeds)),
        jobs=jobs,
        orders={point: recipe.config.order.name for point, recipe in recipes.items()},
        configs={point: recipe.config for point, recipe in recipes.items()},
        question=_question(own, task.metric, task.higher_is_better),
        metric=task.metric,
        stops=own.get("stop", STOP[0]) == STOP[0] and not exhaustive,
        exhaustive=exhaustive,
    )


def _stored(results_dir: Path, signatures: Iterable[str]) -> dict[str, Path]:
    """Where the finished ones of these runs are: the rows that tables and report read, published ones among them.

    Raises UserError for a row that does not fit the files beside it.
    """
    if not results_dir.is_dir() and not (results_dir.parent / PUBLISHED).is_dir():
        return {}
    store, wanted = Store.read(results_dir), list(signatures)
    others = len(store.problems)  # of rows that cannot be read: nobody knows whose they are
    store.check(wanted)
    if mine := store.problems[others:]:
        raise UserError(mine[0])
    return {signature: store.folders[signature].path for signature in wanted if signature in store.rows}


def _separated(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The search's own keys and values, and overrides of runs."""
    own: dict[str, str] = {}
    overrides: list[str] = []
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(
                f"qprune frontier takes KEY=VALUE, not {text!r}; for example task=espcn bits=4,8 max_loss=1%"
            )
        if key == "force" and value != "false":
            raise UserError(
                f"{text}: a search takes finished runs as they are; qprune run ... force=true runs one again"
            )
        if key.startswith(("hydra/", "hydra.")):
            raise UserError(
                f"{text}: a search picks its runs one after the other and uses no launcher; start the same command "
                "several times, in other terminals or on other machines that share results_dir, to spread them"
            )
        if key in OWN_KEYS:
            own[key] = value
        elif key not in ALIASES and (near := get_close_matches(key, (*OWN_KEYS, *ALIASES), 1, 0.75)):
            raise UserError(f"unknown key {key!r}; did you mean {near[0]!r}?")
        else:
            overrides.append(f"{ALIASES.get(key, key)}={value}")
    if "stop" in own:
        one_of("stop", own["stop"], STOP)
    return own, overrides


def _models(composer: Composer, values: dict[str, list[str]], prefixes: dict[str, str]) -> list[_Model]:
    """The float network, and all cells of all families; cells whose runs are the same are one."""
    grid_keys = ("quantize.bits", "prune.sparsity", "order", "seed")
    fixed = [f"{prefixes[k]}={v[0]}" for k, v in values.items() if k not in grid_keys and len(v) == 1]
    varied = {key: texts for key, texts in values.items() if key not in grid_keys and len(texts) > 1}
    bits = [_number(text, "bits", "2 to 16, or 32 for none", _are_bits) for text in values["quantize.bits"]]
    sparsities = [
        _number(text, "sparsity", "0 <= sparsity < 1", lambda s: 0 <= s < 1) for text in values["prune.sparsity"]
    ]
    for order in values["order"]:
        steps = set(composer.config([*fixed, f"order={order}"]).order.steps)
        if steps != {"prune", "quantize"}:
            raise UserError(
                f"order={order}: a search varies bits and sparsity, and this order has not both; give one that has, "
                "and sparsity=0 for quantization alone or bits=32 for pruning alone"
            )
    names = {(True, True): "baseline", (False, True): "quantize_only", (True, False): "prune_only"}
    cells = [(FLOAT_BITS, 0.0), *itertools.product(bits, sparsities)]
    found: dict[str, _Model] = {}
    for order, *choice in itertools.product(values["order"], *varied.values()):
        extra = [f"{prefixes[key]}={value}" for key, value in zip(varied, choice, strict=True)]
        family = " ".join([order, *extra])
        for b, s in cells:
            name = names.get((b == FLOAT_BITS, s == 0), order)
            words = [*fixed, *extra, f"order={name}"]
            words += [f"quantize.bits={b:g}"] if b != FLOAT_BITS else []
            words += [f"prune.sparsity={s:g}"] if s else []
            model = _Model(tuple(words), frozenset([family][name == "baseline" :]), int(b), s, " ".join(extra))
            same = found.setdefault(composer.signature(words, 0), model)
            found[composer.signature(words, 0)] = replace(same, families=same.families | model.families)
    if sum(model.bits == FLOAT_BITS and model.sparsity == 0 for model in found.values()) > 1:
        raise UserError(
            f"{' and '.join(varied)}: several values make several float networks, and a search has one to compare "
            "with; give one value, and make one search for each"
        )
    return list(found.values())


def _point(sizer: Any, model: _Model, recipe: Any) -> Point:
    notation = identity.notation(recipe.config)
    name = f"{notation} ({model.note})" if model.note else notation
    return Point(name, model.families, model.bits, model.sparsity, sizer.footprint(recipe).size_bits())


def _question(own: dict[str, str], metric: str, higher_is_better: bool) -> Question:
    return Question(
        higher_is_better=higher_is_better,
        max_loss=_amount("max_loss", own["max_loss"], metric) if "max_loss" in own else None,
        max_size_bits=_size(own["max_size"]) if "max_size" in own else None,
        margin=_amount("margin", own["margin"], metric) if "margin" in own else Question.margin,
    )


def _amount(key: str, text: str, metric: str) -> Amount:
    unit = unit_of_difference(metric)
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[a-zA-Z]*)", text.strip())
    if match is None or match[2] not in ("%", unit, ""):
        raise UserError(
            f"{key}={text} is no amount of {metric}; type {key}=1% for 1 % of the float network's score, or "
            f"{key}=0.3{unit} for a difference in {metric}"
        )
    return Amount(float(match[1]), match[2] == "%")


def _size(text: str) -> float:
    factors = {"Mb": 1e6, "kb": 1e3, "MB": 8e6, "kB": 8e3}
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)", text.strip())
    if match is None or match[2] not in factors or float(match[1]) == 0:
        raise UserError(
            f"max_size={text} is no size; type for example max_size=20Mb (10^6 bits), kb, or in bytes MB or kB"
        )
    return float(match[1]) * factors[match[2]]


def _are_bits(value: float) -> bool:
    return value == FLOAT_BITS or (2 <= value <= 16 and value == int(value))


def _number(text: str, key: str, legal: str, is_legal: Any) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or not is_legal(value):
        raise UserError(f"{key}={text} is not legal; type {legal}")
    return value


def _values(override: Override) -> list[str]:
    """All values of an override, as texts."""
    return [text.partition("=")[2] for text in values_of(override)]


def _prefix(override: Override) -> str:
    return str(override.input_line).partition("=")[0]
