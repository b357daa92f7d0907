"""Legal values of config keys: a type with a range and a unit, checked with a message that says what to type.

A range stands beside the type, in the table of `fields` for the runner's keys and in the signature of a task for its
own: `batch_size: Annotated[int, Range(1, unit="samples")] = 128`. Types without one are checked as types.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from qprune.errors import UserError, one_of


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high` in `unit`; above, below: without `low`, without `high`."""

    low: float = -math.inf
    high: float = math.inf
    unit: str = ""
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low, high = f"{self.low:.15g}", f"{self.high:.15g}"
        if math.isinf(self.high):
            return "" if math.isinf(self.low) else f" {'>' if self.above else '>='} {low}"
        return f" in {'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"


# What several tasks have
Samples = Annotated[int, Range(1, 1 << 20, "samples")]
Channels = Annotated[int, Range(1, 4096, "channels")]
Pixels = Annotated[int, Range(1, 1 << 14, "pixels")]
Rate = Annotated[float, Range(0, 1e6, above=True)]  # a learning rate has no unit
Fraction = Annotated[float, Range(0, 1)]
Momentum = Annotated[float, Range(0, 1, below=True)]
Weight = Annotated[float, Range(0, 1e9)]  # of a term of a loss, or of decay


def check(key: str, value: Any, kind: Any) -> None:
    """Raise UserError unless `value` is of `kind`; `key` as the user types it. Kinds that are no config's pass.

    kind: an annotation, or a tuple of the words that are legal.
    """
    optional, plain, legal = taken_apart(kind)
    if value is None and optional:
        return
    origin = get_origin(plain) or plain
    if isinstance(plain, tuple):
        one_of(key, value, plain)
    elif origin in (int, float, bool, str):
        if not _fits(value, origin, legal):
            raise UserError(f"{key}={value!r} is not {_words(origin, legal)}{', or null' if optional else ''}")
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            raise UserError(f"{key}={value!r} is not a list; type it as {key}=[...]")
        inner = next(iter(get_args(plain)), Any)
        for index, item in enumerate(value):
            check(f"{key}[{index}]", item, inner)
    elif isinstance(origin, type) and issubclass(origin, Mapping) and not isinstance(value, Mapping):
        raise UserError(f"{key}={value!r} is a section of keys; set one of them with {key}.KEY=VALUE")


def taken_apart(kind: Any) -> tuple[bool, Any, Range | None]:
    """Whether null is legal, the type without that and without its range (words as a tuple), and the range."""
    legal, optional = None, False
    while True:
        if get_origin(kind) is Annotated:
            kind, *notes = get_args(kind)
            legal = next((note for note in notes if isinstance(note, Range)), legal)
        elif get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind):
            optional, others = True, [part for part in get_args(kind) if part is not type(None)]
            if len(others) > 1:
                return True, Any, None
            kind = others[0]
        else:
            return optional, get_args(kind) if get_origin(kind) is Literal else kind, legal


def _fits(value: Any, kind: type, legal: Range | None) -> bool:
    if kind is str:
        return isinstance(value, str) and value != "" and "\0" not in value
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if not isinstance(value, int if kind is int else (int, float)):
        return False
    # compared before it is made a float: a whole number may be too large for one
    return abs(value) <= sys.float_info.max and (legal is None or value in legal)


def _words(kind: type, legal: Range | None) -> str:
    if kind is bool:
        return "true or false"
    if kind is str:
        return "text; quote what YAML reads as something else"
    number = "a whole number" if kind is int else "a number"
    unit = f" of {legal.unit}" if legal is not None and legal.unit else ""
    return f"{number}{unit}{legal or ''}"
