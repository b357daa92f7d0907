"""The result row of a run.

A row holds no times, dates or paths: the same config and seed on the same machine give a file with the same bytes.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from qprune.config.schema import Name
from qprune.errors import RunFailure
from qprune.runs.stored import first_problem

SCHEMA_VERSION = 1

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Bits = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Row:
    """One finished run, checked by pydantic.

    Sizes in bits and performance densities are in the accountings `paper` and `actual` (spec 5.2); `mask_bits_actual`
    is what `actual with masks` adds to the latter.
    """

    schema_version: Literal[1]
    signature: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    task: Name  # names become parts of paths
    order: Name
    notation: str
    seed: Annotated[int, Field(ge=0)]
    metric: str  # name of the score of the last epoch, with its unit
    score: float
    higher_is_better: bool
    epochs: Count
    steps: Count
    budget: Name
    data_source: Name
    marks: list[str]  # reasons why the row may not pass for the paper's
    weight_sparsity: Fraction
    feature_sparsity: Fraction
    weight_bits_paper: Bits
    feature_bits_paper: Bits
    input_bits_paper: Bits
    density_paper: float
    weight_bits_actual: Bits
    feature_bits_actual: Bits
    input_bits_actual: Bits
    density_actual: float
    metrics: dict[str, float]  # further figures of the last evaluation
    float_bits_actual: Bits = 0.0  # size of the float network, 0 in older rows
    density_unit: str = ""
    arithmetic: Count = 1  # version of the arithmetic of training: rows of different versions differ in bits
    recovery: dict[str, float] = Field(default_factory=dict)  # as `Timeline.recovery` returns; older rows have none
    mask_bits_actual: Bits | None = None  # older rows have neither these bits nor costs
    density_with_masks: float | None = None
    costs: dict[str, float] = Field(default_factory=dict)  # total of `Cost`, at the size at which features are counted
    density_effective_bops: float | None = None  # the density with effective bit operations in the place of bits

    def size_bits(self, accounting: str = "actual") -> float:
        """Return the size of weights, features and input in bits."""
        return float(sum(getattr(self, f"{kind}_bits_{accounting}") for kind in ("weight", "feature", "input")))


_ROW = TypeAdapter(Row)


def make_row(**fields: Any) -> Row:
    """Return a row of a run's own figures. Raises RunFailure naming a bad field."""
    try:
        return Row(**fields)
    except ValidationError as error:
        raise RunFailure(f"the run ended with a result that cannot be stored: {first_problem(error)}") from error


def parse_row(content: bytes) -> Row:
    """Return the row that a file holds. Raises ValueError naming a bad field."""
    try:
        return _ROW.validate_json(content)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from error
