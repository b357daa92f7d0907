"""What remains of a run: the result row and the files that hold rows.

A row holds no times, dates or paths: the same config and seed on the same machine give a file with the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from qprune.atomic_write import write_json
from qprune.errors import RunFailure, UserError
from qprune.runs.checksums import check_content, read_bytes, sums_of

SCHEMA_VERSION = 1
ROW_FILE = "result.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """One finished run.

    signature: see `signature`. notation: see `notation`. score: of the last epoch, `metric` names it with its unit.
    epochs, steps: as trained. marks: reasons why the row may not pass for the paper's. *_sparsity: fraction of zeros
    that was reached over the pruned tensors. *_bits_*: sizes in bits in the accountings `paper` and `actual`.
    density_*: performance density in the task's unit (spec 5.2). metrics: further figures of the last evaluation.
    Raises ValueError, naming the field, for a wrong type, a number that is not finite or one out of its range.
    """

    schema_version: int
    signature: str
    task: str
    order: str
    notation: str
    seed: int
    metric: str
    score: float
    higher_is_better: bool
    epochs: int
    steps: int
    budget: str
    data_source: str
    marks: list[str]
    weight_sparsity: float
    feature_sparsity: float
    weight_bits_paper: float
    feature_bits_paper: float
    input_bits_paper: float
    density_paper: float
    weight_bits_actual: float
    feature_bits_actual: float
    input_bits_actual: float
    density_actual: float
    metrics: dict[str, float]

    def __post_init__(self) -> None:
        for name, kind in _FIELDS.items():
            given = getattr(self, name)
            if type(given) is _PLAIN.get(kind):  # nearly all
                continue
            if type(given) is float and kind == "float" and abs(given) <= sys.float_info.max:
                continue
            object.__setattr__(self, name, _checked(name, kind, given))
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {self.schema_version}, and this version of qprune reads {SCHEMA_VERSION}"
            )
        if not re.fullmatch("[0-9a-f]{64}", self.signature):
            raise ValueError(f"signature is {self.signature!r}, not 64 hexadecimal digits")
        for name, low, high in _RANGES:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}, outside [{low}, {high}]")


_FIELDS = {field.name: str(field.type) for field in dataclasses.fields(Row)}  # name: annotation
_RANGES = (
    ("seed", 0, math.inf),
    ("epochs", 1, math.inf),
    ("steps", 1, math.inf),
    ("weight_sparsity", 0, 1),
    ("feature_sparsity", 0, 1),
    *(
        (f"{kind}_bits_{accounting}", 0, math.inf)
        for kind in ("weight", "feature", "input")
        for accounting in ("paper", "actual")
    ),
)


def save_row(path: Path, row: Row) -> None:
    """Write a row atomically: a reader sees the whole file or none. RunFailure for a full disk."""
    write_json(path, dataclasses.asdict(row))


def make_row(**fields: Any) -> Row:
    """A row from a run's own figures. Raises RunFailure, naming the field, for one that no run may end with."""
    try:
        return Row(**fields)
    except ValueError as error:
        raise RunFailure(f"the run ended with a result that cannot be stored: {error}") from error


def load_row(path: Path) -> Row:
    """Read a row. Raises UserError, naming file and field, for all but a whole and valid one as its run left it."""
    return _load(str(path)).row


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A row, its file and the checksums of that file's folder (None where there are none)."""

    row: Row
    path: Path
    sums: Mapping[str, str] | None


def _load(path: str) -> Stored:
    advice = "delete the file, or run its command again with force=true"
    try:
        content = read_bytes(path)
        fields = _DECODER.decode(content.decode(json.detect_encoding(content), "surrogatepass"))
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, NaN
        raise UserError(f"{path} is not readable JSON ({error}); {advice}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    folder, name = os.path.split(path)
    check_content(folder or ".", name, content, sums := sums_of(folder or "."))
    if not isinstance(fields, dict):
        raise UserError(f"{path} does not hold a result row but a {type(fields).__name__}; {advice}")
    # an older or newer schema has other fields: say so before naming one of them
    if "schema_version" in fields and fields["schema_version"] != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {fields['schema_version']!r}, and this version of qprune reads "
            f"{SCHEMA_VERSION}; {advice}"
        )
    if missing := sorted(_FIELDS.keys() - fields.keys()):
        raise UserError(f"{path}: the field {missing[0]} is missing; {advice}")
    if unknown := sorted(fields.keys() - _FIELDS.keys()):
        raise UserError(f"{path}: {unknown[0]!r} is not a field of a result row; {advice}")
    try:
        return Stored(Row(**fields), Path(path), sums)
    except ValueError as error:
        raise UserError(f"{path}: {error}; {advice}") from error


def read_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """All rows below `folder`, sorted by path, and what is wrong with the files that hold no good one."""
    stored, problems = read_stored(folder)
    return [entry.row for entry in stored], problems


def read_stored(folder: Path) -> tuple[list[Stored], list[str]]:
    """As `read_rows`, with the file of each row.

    Of several rows with one signature the first counts: a copied folder must not weigh twice.
    """
    stored: dict[str, Stored] = {}
    problems = []
    for name in _row_files(folder):
        try:
            entry = _load(name)
        except UserError as error:
            problems.append(str(error))
            continue
        first = stored.setdefault(entry.row.signature, entry)
        if first is not entry:
            problems.append(f"{name} has the signature of {first.path} and is left out; delete one of them")
    return list(stored.values()), problems


def _row_files(folder: Path) -> list[str]:
    """The files of rows below `folder`, sorted as paths are; pathlib would take as long as reading them."""
    found = [os.path.join(place, ROW_FILE) for place, *inside in os.walk(folder) if any(ROW_FILE in s for s in inside)]  # noqa: PTH118
    return sorted(found, key=lambda name: name.split(os.sep))  # noqa: PTH206


def format_row(row: Row) -> Text:
    """A row for people, on a few lines: recipe and score, sizes in Mb (10^6 bits), densities and marks."""
    lines = [
        f"{row.task}  {row.notation}  seed {row.seed}  {row.metric} {row.score:.4g}",
        f"  {'accounting':<10}  {'weights Mb':>10}  {'features Mb':>11}  {'input Mb':>8}  {'density':>8}",
    ]
    for accounting in ("paper", "actual"):
        weight, feature, data = (
            getattr(row, f"{kind}_bits_{accounting}") / 1e6 for kind in ("weight", "feature", "input")
        )
        density = getattr(row, f"density_{accounting}")
        lines.append(f"  {accounting:<10}  {weight:>10.4g}  {feature:>11.4g}  {data:>8.4g}  {density:>8.4g}")
    lines.append(
        f"  zeros: weights {row.weight_sparsity:.1%}, features {row.feature_sparsity:.1%}; "
        f"{row.epochs} epochs, {row.steps} steps"
    )
    lines += [f"  mark: {mark}" for mark in row.marks]
    return Text("\n".join(lines))


_PLAIN: dict[str, type] = {"bool": bool, "int": int, "str": str}
_TYPES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (float, int), "str": (str,)}


def _checked(name: str, kind: str, value: Any) -> Any:
    """`value` as a field of type `kind` (as annotated in Row); ValueError unless it is one and finite."""
    if kind == "list[str]" and isinstance(value, list):
        return [_checked(f"{name}[{i}]", "str", item) for i, item in enumerate(value)]
    if kind == "dict[str, float]" and isinstance(value, dict):
        return {_checked(f"{name}'s key", "str", k): _checked(f"{name}.{k}", "float", v) for k, v in value.items()}
    fits = isinstance(value, _TYPES.get(kind, ())) and (kind == "bool" or not isinstance(value, bool))
    if not fits:
        raise ValueError(f"{name} is {value!r}, not of the type {kind}")
    if kind == "float":
        # compared first: a whole number may be too large for a float
        if not abs(value) <= sys.float_info.max:
            raise ValueError(f"{name} is not a finite number")
        return float(value)
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
