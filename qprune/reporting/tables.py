"""Tables: rows that name runs, joined with the stored results and the paper's values.

A table is a list of parts (one task each), a part a list of rows, a row a list of overrides with the paper's values
beside it: the list that launches the runs is the list that reports them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qprune.errors import UserError, closest
from qprune.runs.store import Store

FLOAT_BITS = 32.0
COLUMNS: dict[str, str] = {  # of a joined table: name -> pandas dtype
    "part": "str",
    "label": "str",
    "metric": "str",
    "unit": "str",
    "density_unit": "str",
    "score": "float64",
    "score_sd": "float64",
    "n": "int64",
    "paper_score": "float64",
    "difference": "float64",
    "weight_mb_paper": "float64",
    "feature_mb_paper": "float64",
    "weight_mb_actual": "float64",
    "feature_mb_actual": "float64",
    "density_paper": "float64",
    "density_actual": "float64",
    "paper_density": "float64",
    "marks": "object",
    "missing_seeds": "object",
    "command": "str",
    "best": "bool",
}


@dataclass(frozen=True)
class TableRow:
    """A row of our own runs. score, density, weight_mb, feature_mb: as the paper prints them, None where it does not.

    decimal_from: overrides of the run, with the same seed, whose decimal bits are fixed from the start (Table 1).
    """

    label: str
    overrides: Sequence[str]
    score: float | None = None
    density: float | None = None
    weight_mb: float | None = None
    feature_mb: float | None = None
    decimal_from: Sequence[str] | None = None


@dataclass(frozen=True)
class OtherMethod:
    """A row that others trained: their score; sizes from elements, bits and sparsities, or else the Mb as printed.

    weights, features: elements as the accounting `paper` counts them (features twice; spec 5.1), None where unknown.
    weight_mb, feature_mb, density: as the paper prints them.
    """

    label: str
    score: float
    weight_mb: float
    feature_mb: float
    density: float
    weights: int | None = None
    features: int | None = None
    weight_bits: float = FLOAT_BITS
    feature_bits: float = FLOAT_BITS
    weight_sparsity: float = 0.0
    feature_sparsity: float = 0.0

    def sizes_mb(self) -> tuple[float, float]:
        """Mb of weights and of features: counted where the elements are known."""
        weight, feature = self.weight_mb, self.feature_mb
        if self.weights is not None:
            weight = self.weights * self.weight_bits * (1 - self.weight_sparsity) / 1e6
        if self.features is not None:
            feature = self.features * self.feature_bits * (1 - self.feature_sparsity) / 1e6
        return weight, feature


@dataclass(frozen=True)
class Part:
    """The rows of one task. metric: the key of its score; overrides stand before those of each row."""

    name: str
    metric: str
    unit: str
    density_unit: str
    overrides: Sequence[str]
    rows: Sequence[TableRow]
    other: Sequence[OtherMethod] = ()

    @property
    def task(self) -> str:
        """The task that the part names."""
        return next((text.removeprefix("task=") for text in self.overrides if text.startswith("task=")), "")


@dataclass(frozen=True)
class Table:
    """name: that of its file. title: the caption."""

    name: str
    title: str
    parts: Sequence[Part]


def table_from(name: str, config: Any) -> Table:
    """A table from the content of its YAML. Raises UserError naming what is wrong in it."""
    where = f"table {name}"
    top = _section(config, {"title", "parts"}, where)
    parts = []
    for part in _list(top["parts"], f"{where}: parts"):
        fields = dict(_section(part, {"name"}, f"{where}: a part"))
        inside = f"{where}, part {fields['name']}"
        fields["rows"] = [_built(TableRow, row, inside) for row in _list(fields.get("rows", []), f"{inside}: rows")]
        fields["other"] = [_built(OtherMethod, row, inside) for row in _list(fields.get("other", []), inside)]
        parts.append(_built(Part, fields, inside))
    return Table(name, str(top["title"]), parts)


@dataclass(frozen=True)
class Wanted:
    """What one row of a table asks for: signature of the run per seed, and the command that makes a seed's run."""

    row: TableRow
    signatures: Mapping[int, str]
    seeds: Sequence[int]  # those that must be there; further ones count when they are
    command: str


def join(part: Part, wanted: Sequence[Wanted], store: Store) -> pd.DataFrame:
    """One row per row of `part`, with the columns COLUMNS: our runs (mean, sd over seeds) beside the paper's values."""
    lines = []
    for want in wanted:
        there = {seed: name for seed, name in want.signatures.items() if name in store.rows}
        lines.append(_ours(part, want, store.columns.loc[list(there.values())], set(there)))
    lines += [_theirs(part, method) for method in part.other]
    table = pd.DataFrame(lines, columns=list(COLUMNS)).astype(COLUMNS)
    joined = [name for want in wanted for name in want.signatures.values() if name in store.rows]
    return _with_best(table, store.columns.loc[joined])


def _ours(part: Part, want: Wanted, runs: pd.DataFrame, there: Collection[int]) -> dict[str, Any]:
    paper = want.row
    missing = [seed for seed in want.seeds if seed not in there]
    line: dict[str, Any] = {
        **_head(part, paper.label),
        "n": len(runs),
        "paper_score": _number(paper.score),
        "paper_density": _number(paper.density),
        "marks": marks_of(part, runs),
        "missing_seeds": missing,
        "command": want.command,
        "score": runs["score"].mean(),
        "score_sd": runs["score"].std(ddof=1),
    }
    line["difference"] = line["score"] - line["paper_score"]
    for accounting in ("paper", "actual"):
        line[f"density_{accounting}"] = runs[f"density_{accounting}"].mean()
        for kind in ("weight", "feature"):
            line[f"{kind}_mb_{accounting}"] = runs[f"{kind}_bits_{accounting}"].mean() / 1e6
    return line


def _theirs(part: Part, method: OtherMethod) -> dict[str, Any]:
    weight, feature = method.sizes_mb()
    counted = method.weights is not None and method.features is not None
    marks = ["score as its authors report it"] + ([] if counted else ["sizes as the paper prints them, not counted"])
    return {
        **_head(part, method.label),
        "paper_score": method.score,
        "paper_density": method.density,
        "weight_mb_paper": weight,
        "feature_mb_paper": feature,
        "density_paper": method.score / (weight + feature),
        "marks": marks,
    }


def _head(part: Part, label: str) -> dict[str, Any]:
    empty: dict[str, Any] = {name: math.nan for name, kind in COLUMNS.items() if kind == "float64"}
    empty |= {"n": 0, "missing_seeds": [], "command": "", "best": False}
    names = {"part": part.name, "label": label, "metric": part.metric, "unit": part.unit}
    return empty | names | {"density_unit": part.density_unit}


def marks_of(part: Part, runs: pd.DataFrame) -> list[str]:
    """Why these runs must not pass for the paper's: their own marks, and what their fields say without them."""
    marks = list(dict.fromkeys(mark for marks in runs["marks"] for mark in marks))
    for source in runs["data_source"].unique():
        if source != "real" and f"{source} data" not in marks:
            marks.append(f"{source} data")
    for budget in runs["budget"].unique():
        if budget != "paper" and not any(f"budget={budget}" in mark for mark in marks):
            marks.append(f"budget={budget}")
    for metric in runs["metric"].unique():
        if metric != part.metric:
            marks.append(f"the score is {metric}, not {part.metric}")
    return marks


def _with_best(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Mark the best compressed row of our own `runs` (no baseline), if at least two can be compared."""
    ours = table[(table["n"] > 0) & (table["label"] != "Baseline")]
    if len(ours) < 2:
        return table
    # Of the runs, not of the part: its metric may be another one than theirs (fid_proxy for fid).
    higher = bool(runs["higher_is_better"].iloc[0])
    table.loc[ours["score"].idxmax() if higher else ours["score"].idxmin(), "best"] = True
    return table


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _section(value: Any, needed: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}, not a section with the keys {', '.join(sorted(needed))}")
    if lacking := sorted(needed - set(value)):
        raise UserError(f"{where}: the key {lacking[0]} is missing")
    return dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{where} is {value!r}, not a list")
    return list(value)


def _built(kind: type, value: Any, where: str) -> Any:
    parameters = inspect.signature(kind).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    fields = _section(value, needed, where)
    for key in fields:
        if key not in parameters:
            raise UserError(
                f"{where}: {key} is not a key of it{closest(key, parameters)}; legal: {', '.join(parameters)}"
            )
    return kind(**fields)
