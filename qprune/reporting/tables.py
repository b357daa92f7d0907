"""The paper's tables, joined with stored results.

A table is a list of parts (one task each), a part a list of rows, a row a list of overrides with the paper's values.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Annotated, Any

import pandas as pd
from pydantic import Field, ValidationError

from qprune.config.schema import Section
from qprune.config.types import explain
from qprune.errors import UserError
from qprune.reporting.statistics import table_of
from qprune.runs.row import Row
from qprune.runs.store import Store, versions_text

COSTS = ("effective_gbops", "density_effective_bops")  # shown where runs have costs
_NUMBERS = (  # columns of a joined part
    *("score", "score_sd", "n", "paper_score", "difference", "weight_mb_paper", "feature_mb_paper"),
    *("weight_mb_actual", "feature_mb_actual", "density_paper", "density_actual", "paper_density"),
    *("density_paper_sd", "density_actual_sd"),
    *(f"{kind}_after_{name}" for kind in ("epochs", "rates") for name in ("pruning", "quantization")),
    *COSTS,
)
_TEXTS = ("part", "label", "metric", "unit", "density_unit")
_COLUMNS = (*_TEXTS, *_NUMBERS, "printed_score", "printed_density", "marks", "missing_seeds", "command", "best")
_FIELDS = [field.name for field in fields(Row)]


Printed = Annotated[Decimal, Field(strict=False)]  # with the digits of the paper: "92.60" in quotes keeps its zero


class TableRow(Section):
    """A row of our own runs, with the values that the paper prints, if any."""

    label: str
    overrides: list[str]
    score: Printed | None = None
    density: Printed | None = None
    weight_mb: float | None = None
    feature_mb: float | None = None
    decimal_from: list[str] | None = None  # the run, of the same seed, whose fraction bits are used (Table 1)


class OtherMethod(Section):
    """A row that others trained; sizes are counted where elements are known."""

    label: str
    score: Printed
    weight_mb: float | None = None  # as the paper prints it, as the next two
    feature_mb: float | None = None
    density: Printed | None = None
    weights: int | None = None  # elements, as the accounting `paper` counts them
    features: int | None = None  # likewise: twice (spec 5.1)
    weight_bits: float = 32.0
    feature_bits: float = 32.0
    weight_sparsity: float = 0.0
    feature_sparsity: float = 0.0

    def sizes_mb(self) -> tuple[float, float]:
        """Return Mb of weights and of features: counted where the elements are known, NaN where nothing is."""
        printed = (self.weight_mb, self.feature_mb)
        weight, feature = (math.nan if size is None else size for size in printed)
        if self.weights is not None:
            weight = self.weights * self.weight_bits * (1 - self.weight_sparsity) / 1e6
        if self.features is not None:
            feature = self.features * self.feature_bits * (1 - self.feature_sparsity) / 1e6
        return weight, feature


class Part(Section):
    """The rows of one task. overrides: stand before those of each row."""

    name: str
    metric: str
    unit: str
    density_unit: str
    overrides: list[str]
    rows: Sequence[TableRow] = ()
    other: Sequence[OtherMethod] = ()

    @property
    def task(self) -> str:
        """The task that the part names."""
        return next((text.removeprefix("task=") for text in self.overrides if text.startswith("task=")), "")


class Table(Section):
    """name: that of its file. title: the caption."""

    name: str
    title: str
    parts: list[Part]


def table_from(name: str, config: Any) -> Table:
    """Build a table from the content of its YAML. Raises UserError."""
    try:
        return Table.model_validate({"name": name, **config} if isinstance(config, Mapping) else config)
    except ValidationError as error:
        raise UserError(explain(error, Table.model_json_schema(), f"table {name}")) from None


@dataclass(frozen=True)
class Joined:
    """A table with its parts joined. missing: runs that its rows lack, as arguments of `qprune run`."""

    table: Table
    parts: list[pd.DataFrame]
    missing: list[list[str]]


@dataclass(frozen=True)
class Wanted:
    """What a row of a table needs."""

    row: TableRow
    signatures: Mapping[int, str]  # by seed
    seeds: Sequence[int]  # that must be there; further ones count when they are
    command: str  # of missing runs


def join(part: Part, wanted: Sequence[Wanted], store: Store) -> pd.DataFrame:
    """Join the rows of a part with our runs of the newest arithmetic: mean and deviation over seeds."""
    lines: list[dict[str, Any]] = []
    there = [{seed: name for seed, name in want.signatures.items() if name in store.rows} for want in wanted]
    newest = store.newest(name for names in there for name in names.values())
    for want, names in zip(wanted, there, strict=True):
        kept = {seed: name for seed, name in names.items() if name in newest}
        runs = pd.DataFrame([vars(store.rows[name]) for name in kept.values()], columns=_FIELDS)
        line = _ours(part, want, runs.infer_objects(), kept)
        line["marks"] += versions_text(store.rows[name].arithmetic for name in names.values() if name not in newest)
        lines.append(line | (store.recovery(next(iter(kept.values()))) if kept else {}))
    lines += [_theirs(method) for method in part.other]
    head = {"part": part.name, "metric": part.metric, "unit": part.unit, "density_unit": part.density_unit}
    table = pd.DataFrame([head | line for line in lines], columns=list(_COLUMNS))
    table = table.astype(dict.fromkeys(_NUMBERS, float) | {"n": int})
    table["difference"] = table["score"] - table["paper_score"]
    compressed = table.index[(table["n"] > 0) & (table["label"] != "Baseline")]
    if len(compressed) > 1:
        # Of the runs, not of the part: its metric may be another one than theirs (fid_proxy for fid).
        sign = 1 if store.rows[min(newest)].higher_is_better else -1
        scores = {}
        for place in compressed:
            rows = [store.rows[name] for name in there[place].values() if name in newest]
            scores[place] = pd.Series({row.seed: sign * row.score for row in rows})
        best, is_shown, mark = _best(scores, table["label"])
        table.loc[best, "best"] = is_shown
        lines[best]["marks"].append(mark)  # the list that stands in the table
    return table


def _best(scores: "Mapping[int, pd.Series[float]]", labels: "pd.Series[str]") -> tuple[int, bool, str]:
    """Find the row of the best mean, whether it is shown to be better than every other, and what to say of it.

    scores: by place and seed, of which more is better.
    """
    best, *others = sorted(scores, key=lambda place: -float(scores[place].mean()))
    tested = table_of([(scores[best] - scores[place]).dropna().tolist() for place in others])
    for place, each in zip(others, tested, strict=True):
        if not each.differs:
            why = f"p = {each.p_table:.2g} of the paired t test" if each.can_decide else "too few seeds in common"
            return best, False, f"the best score, but not shown to be better than {labels[place]}: {why}"
    p_t, p_flip = (max(getattr(each, name) for each in tested) for name in ("p_table", "p_flip"))
    p_values = f"p <= {p_t:.2g} (paired t), {p_flip:.2g} (sign flips)"
    return best, True, f"shown to be better than every other compressed row: {p_values}"


def _ours(part: Part, want: Wanted, runs: pd.DataFrame, there: Collection[int]) -> dict[str, Any]:
    line = {"label": want.row.label} | _printed(want.row)
    line |= {"n": len(runs), "score": runs["score"].mean(), "score_sd": runs["score"].std(ddof=1)}
    for accounting in ("paper", "actual"):
        line[f"density_{accounting}"] = runs[f"density_{accounting}"].mean()
        line[f"density_{accounting}_sd"] = runs[f"density_{accounting}"].std(ddof=1)
        for kind in ("weight", "feature"):
            line[f"{kind}_mb_{accounting}"] = runs[f"{kind}_bits_{accounting}"].mean() / 1e6
    bops = [costs.get("effective_bops") for costs in runs["costs"]]
    line["effective_gbops"] = pd.Series(bops, dtype=float).mean() / 1e9
    line["density_effective_bops"] = runs["density_effective_bops"].astype(float).mean()
    missing = [seed for seed in want.seeds if seed not in there]
    return line | {"marks": marks_of(part, runs), "missing_seeds": missing, "command": want.command, "best": False}


def _theirs(method: OtherMethod) -> dict[str, Any]:
    weight, feature = method.sizes_mb()
    marks = ["score as its authors report it"]
    if method.weights is None or method.features is None:
        marks.append("sizes as the paper prints them, not counted")
    line = {"label": method.label, "marks": marks} | _printed(method)
    density = float(method.score) / (weight + feature)
    sizes = {"weight_mb_paper": weight, "feature_mb_paper": feature, "density_paper": density}
    return line | sizes | {"n": 0, "missing_seeds": [], "command": "", "best": False}


def _printed(row: TableRow | OtherMethod) -> dict[str, Any]:
    """Return the paper's score and density, as numbers and with the digits that it prints."""
    values = {"score": row.score, "density": row.density}
    numbers = {f"paper_{name}": value for name, value in values.items()}
    return numbers | {f"printed_{name}": "" if value is None else str(value) for name, value in values.items()}


def marks_of(part: Part, runs: pd.DataFrame) -> list[str]:
    """Return why these runs must not pass for the paper's."""
    marks = list(dict.fromkeys(mark for marks in runs["marks"] for mark in marks))
    marks += [f"{name} data" for name in runs["data_source"].unique() if name != "real" and f"{name} data" not in marks]
    budgets = [f"budget={name}" for name in runs["budget"].unique() if name != "paper"]
    marks += [budget for budget in budgets if not any(budget in mark for mark in marks)]
    others = [name for name in runs["metric"].unique() if name != part.metric]
    return marks + [f"the score is {name}, not {part.metric}" for name in others]
