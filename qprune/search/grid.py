"""The grid of a search, read from KEY=VALUE: models, runs, question."""

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from qprune.config import signature as identity
from qprune.config.compose import Composer, values_of
from qprune.config.schema import RunConfig
from qprune.errors import UserError, one_of
from qprune.runs.folder import PUBLISHED, RunFolder
from qprune.runs.jobs import expand
from qprune.runs.scores import unit_of_difference
from qprune.runs.store import Store, versions_text
from qprune.search.frontier import FLOAT_BITS, Amount, Point, Question, in_order

if TYPE_CHECKING:
    from qprune.training.task import Task

ALIASES = {"bits": "quantize.bits", "sparsity": "prune.sparsity"}
DEFAULTS = {"quantize.bits": "3,4,6,8", "prune.sparsity": "0,0.25,0.5,0.75", "seed": "0", "order": "prune_first"}
OWN_KEYS = ("max_loss", "max_size", "margin", "stop")
STOP = ("early", "never")
SIZE_UNITS = {"Mb": 1e6, "kb": 1e3, "MB": 8e6, "kB": 8e3}
LEGAL: dict[str, tuple[str, Callable[[float], bool]]] = {
    "bits": ("2 to 16, or 32 for none", lambda n: n == FLOAT_BITS or (2 <= n <= 16 and n % 1 == 0)),
    "sparsity": ("0 <= sparsity < 1", lambda n: 0 <= n < 1),
    "seed": ("a whole number >= 0", lambda n: n >= 0 and n % 1 == 0),
}
Run = tuple[Point, int]  # a model and a seed


@dataclass(frozen=True)
class Grid:
    """The models, their runs, and what is asked."""

    points: list[Point]  # in the order of trying
    seeds: list[int]
    overrides: dict[Run, list[str]]
    configs: dict[Run, RunConfig]
    signatures: dict[Run, str]
    folders: dict[Run, RunFolder]  # of finished runs perhaps below `published`
    question: Question
    stops: bool  # whether hopeless runs are stopped early
    exhaustive: bool  # whether every run is carried out to its end
    task: "Task"  # of all runs, on synthetic data
    left_out: list[str]  # published runs of another arithmetic, in words

    def config(self, point: Point | None = None) -> RunConfig:
        """Return the config of a model's first run, or of the first model's."""
        return self.configs[point or self.points[0], self.seeds[0]]


def grid_of(
    arguments: Sequence[str], config_dir: str | None = None, exhaustive: bool = False, arithmetic: int | None = None
) -> Grid:
    """Read the grid of these words. Raises UserError, also for rows that were edited.

    arithmetic: the version that all rows must have; None: the newest that some row has.
    """
    own, overrides = _separated(expand(arguments, config_dir))
    models: dict[Point, list[str]] = {}
    with Composer(config_dir) as composer:
        parsed = composer.parse([*(f"{key}={text}" for key, text in DEFAULTS.items()), *overrides])
        choices = {override.key_or_group: values_of(override) for override in parsed}
        seeds = list(dict.fromkeys(int(seed) for seed in _numbers("seed", choices["seed"])))
        cells = _cells(composer, choices)
        from qprune.search.size import planned_footprint, task_of  # late: they import torch, slow for bad input
        from qprune.training.task import VALIDATION

        checked = [composer.checked([*cell.overrides, f"seed={seeds[0]}"]) for cell in cells]
        task = task_of(checked[0])  # of all cells, as there is one float network
        for config, cell in zip(checked, cells, strict=True):
            name = identity.notation(config) + (f" ({cell.note})" if cell.note else "")
            bits = config.quantize.bits if "quantize" in config.order.steps else FLOAT_BITS
            sparsity = config.prune.sparsity if "prune" in config.order.steps else 0.0
            size = planned_footprint(task, config).size_bits()
            models[Point(name, frozenset(cell.families), bits, sparsity, size)] = cell.overrides
        points = in_order(models)
        runs = {(point, seed): [*models[point], f"seed={seed}"] for point in points for seed in seeds}
        configs = {run: composer.checked(words) for run, words in runs.items()}
    amounts = {key: _amount(key, own[key], task.metric) for key in ("max_loss", "margin") if key in own}
    max_size = _size(own["max_size"]) if "max_size" in own else None
    metric = f"{VALIDATION if checked[0].data.validation else ''}{task.metric}"  # the test set is no set to choose by
    question = Question(task.higher_is_better, max_size_bits=max_size, metric=metric, **amounts)
    signatures = {run: identity.signature(config) for run, config in configs.items()}
    folders, left_out = _folders(configs, signatures, arithmetic)
    stops = own.get("stop", STOP[0]) == STOP[0] and not exhaustive
    return Grid(points, seeds, runs, configs, signatures, folders, question, stops, exhaustive, task, left_out)


def _folders(
    configs: dict[Run, RunConfig], signatures: dict[Run, str], arithmetic: int | None
) -> tuple[dict[Run, RunFolder], list[str]]:
    """Return where the runs are, perhaps among the published rows, and which of these are left out."""
    left_out: list[int] = []
    folders = {run: RunFolder(identity.run_folder(config)) for run, config in configs.items()}
    results_dir = Path(next(iter(configs.values())).results_dir)
    if results_dir.is_dir() or (results_dir.parent / PUBLISHED).is_dir():
        store = Store.read(results_dir)
        others = len(store.problems)  # of rows that cannot be read: whose they are is unknown
        store.check(signatures.values())
        if problems := store.problems[others:]:
            raise UserError(problems[0])
        rows = {run: store.rows[name] for run, name in signatures.items() if name in store.rows}
        version = arithmetic or max((row.arithmetic for row in rows.values()), default=0)
        for run, row in rows.items():
            if row.arithmetic == version:
                folders[run] = store.folders[row.signature]
            elif folders[run].finished:
                raise UserError(
                    f"{folders[run].path} is of arithmetic version {row.arithmetic}, and this search of {version}; "
                    "delete the folder, or run its command again with force=true"
                )
            else:
                left_out.append(row.arithmetic)
    return folders, versions_text(left_out)


def _separated(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the search's own keys and values from overrides of runs."""
    own: dict[str, str] = {}
    overrides: list[str] = []
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals:
            advice = "for example task=espcn bits=4,8 max_loss=1%"
            raise UserError(f"qprune frontier takes KEY=VALUE, not {text!r}; {advice}")
        if key == "force" and value != "false":
            advice = "qprune run ... force=true runs one again"
            raise UserError(f"{text}: a search takes finished runs as they are; {advice}")
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
    one_of("stop", own.get("stop", STOP[0]), STOP)
    return own, overrides


@dataclass(frozen=True)
class _Cell:
    """A model of the grid."""

    overrides: list[str]  # of its runs, but the seed
    note: str  # the keys that vary beside bits and sparsity
    families: set[str] = field(default_factory=set)  # as of its `Point`


def _cells(composer: Composer, choices: dict[str, list[str]]) -> list[_Cell]:
    """List the models; of those that are the same run, one with the families of all."""
    bits, sparsities = _numbers("bits", choices["quantize.bits"]), _numbers("sparsity", choices["prune.sparsity"])
    others = {key: texts for key, texts in choices.items() if key not in DEFAULTS}
    fixed = [texts[0] for texts in others.values() if len(texts) == 1]
    varied = {key: texts for key, texts in others.items() if len(texts) > 1}
    for order in choices["order"]:
        if set(composer.config([*fixed, order]).order.steps) != {"prune", "quantize"}:
            raise UserError(
                f"{order}: a search varies bits and sparsity, and this order has not both; give one that has, "
                "and sparsity=0 for quantization alone or bits=32 for pruning alone"
            )
    found: dict[str, _Cell] = {}
    for order, *extra in itertools.product(choices["order"], *varied.values()):
        note = " ".join(extra)
        for b, s in [(FLOAT_BITS, 0), *itertools.product(bits, sparsities)]:
            quantize, prune = [f"quantize.bits={b:g}"] * (b != FLOAT_BITS), [f"prune.sparsity={s:g}"] * (s > 0)
            alone = "order=quantize_only" if quantize else "order=prune_only" if prune else "order=baseline"
            words = [*fixed, *extra, order if quantize and prune else alone, *quantize, *prune]
            cell = found.setdefault(composer.signature(words, 0), _Cell(words, note))
            if quantize or prune:
                cell.families.add(f"{order.partition('=')[2]} {note}".strip())
    if sum(not cell.families for cell in found.values()) > 1:
        raise UserError(
            f"{' and '.join(varied)}: several values make several float networks, and a search has one to compare "
            "with; give one value, and make one search for each"
        )
    return list(found.values())


def _amount(key: str, text: str, metric: str) -> Amount:
    (value, name), unit = _quantity(text), unit_of_difference(metric)
    if value is None or name not in ("%", unit, ""):
        raise UserError(
            f"{key}={text} is no amount of {metric}; type {key}=1% for 1 % of the float network's score, or "
            f"{key}=0.3{unit} for a difference in {metric}"
        )
    return Amount(value, name == "%")


def _size(text: str) -> float:
    value, unit = _quantity(text)
    if not value or unit not in SIZE_UNITS:
        legal = "max_size=20Mb (10^6 bits), kb, or in bytes MB or kB"
        raise UserError(f"max_size={text} is no size; type for example {legal}")
    return value * SIZE_UNITS[unit]


def _quantity(text: str) -> tuple[float | None, str]:
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|[a-zA-Z]*)", text.strip())
    return (float(match[1]), match[2]) if match else (None, "")


def _numbers(key: str, overrides: Sequence[str]) -> list[float]:
    texts = [text.partition("=")[2] for text in overrides]
    legal, is_legal = LEGAL[key]
    for text in texts:
        with suppress(ValueError):
            if is_legal(float(text)):
                continue
        raise UserError(f"{key}={text} is not legal; type {legal}")
    return [float(text) for text in texts]
