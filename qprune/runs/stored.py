"""The schemas of the files that a run stores beside its row and config, for when they are read again.

A file may have keys that are not listed here. Numbers are bounded, so that what is drawn from them is finite.
"""

import reprlib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

_Text = Annotated[str, Field(max_length=1000)]
_Number = Annotated[float, Field(ge=-1e45, le=1e45)]
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Digits = Annotated[int, Field(ge=-2000, le=2000)]
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class _Epoch(_Stored):
    """A line of metrics.csv; None stands for what was not evaluated."""

    __pydantic_extra__: dict[str, _Number | None]
    epoch: _Count
    step: _Count | None = None
    phase: _Text | None = None


class _PruneOperator(_Stored):
    site: _Text
    kind: Literal["weight", "feature"]
    operator: Literal["prune"]


class _QuantizeOperator(_Stored):
    site: _Text
    kind: Literal["weight", "feature"]
    operator: Literal["quantize"]
    decimals: Annotated[list[_Digits], Field(min_length=1)]


class _Histogram(_Stored):
    site: _Text
    bits: Annotated[int, Field(ge=1, le=64)]
    decimal: _Digits
    width: Annotated[float, Field(ge=1e-45, le=1e45)]
    start: _Number
    counts: Annotated[list[_Count], Field(max_length=4096)]
    elements: Annotated[_Count, Field(ge=1)]
    below: _Count
    above: _Count
    low: _Number
    high: _Number

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if not any(self.counts) or abs(self.start) > 4096 * self.width or (2 * self.start / self.width) % 2:
            raise ValueError("all counts are 0, or start is no edge of the bins")
        return self


class _Timing(_Stored):
    training_seconds: Annotated[float, Field(ge=0, le=1e12)]


class _Commit(_Stored):
    commit: Annotated[str, Field(pattern="^[0-9A-Za-z._-]{1,80}$")]
    changed: bool = False


class Environment(_Stored):
    """environment.json, as far as anything depends on it."""

    git: _Commit | None = None
    dataset: dict[_Text, _Text] = {}


class Stopped(_Stored):
    """The note of a run that was stopped early."""

    reason: _Text
    optimistic_score: float


CURVE, HISTOGRAMS = TypeAdapter(list[_Epoch]), TypeAdapter(list[_Histogram])
OPERATORS = TypeAdapter(list[Annotated[_PruneOperator | _QuantizeOperator, Field(discriminator="operator")]])
TIMING, ENVIRONMENT, STOPPED = TypeAdapter(_Timing), TypeAdapter(Environment), TypeAdapter(Stopped)


def first_problem(error: ValidationError) -> str:
    """Return the first problem in one line, that of a row's schema version above all."""
    problems = error.errors(include_url=False)
    problem = next((each for each in problems if each["loc"] == ("schema_version",)), problems[0])
    field, given = ".".join(map(str, problem["loc"])), shown(problem["input"])
    match problem["type"]:
        case "json_invalid":
            return f"not readable JSON ({problem['ctx']['error']})"
        case "missing":
            return f"the field {field} is missing"
        case "unexpected_keyword_argument":
            return f"{field!r} is not a field of a result row"
        case "literal_error" if field == "schema_version":
            return f"schema_version is {given}, and this version of qprune reads {problem['ctx']['expected']}"
    return f"{field or 'the content'} is {given}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"


def shown(value: Any) -> str:
    """Write a value as Python does, shortened."""
    return _SHORT.repr(value)
