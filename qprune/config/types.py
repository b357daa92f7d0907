"""Legal values of config keys: annotated pydantic types with a range and a unit, and the errors that name them.

The schema uses these types for the keys of every run, a task for the arguments of its constructor:
`batch_size: Samples = 128`, or `blocks: Annotated[int, Field(ge=1, le=100)] = 9`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from qprune.errors import UserError, closest

# true is no number, "8" is no whole number, and neither infinity nor NaN is legal
STRICT = ConfigDict(strict=True, allow_inf_nan=False, str_min_length=1)

Samples = Annotated[int, Field(ge=1, le=1 << 20, json_schema_extra={"unit": "samples"})]
Channels = Annotated[int, Field(ge=1, le=4096, json_schema_extra={"unit": "channels"})]
Pixels = Annotated[int, Field(ge=1, le=1 << 14, json_schema_extra={"unit": "pixels"})]
Rate = Annotated[float, Field(gt=0, le=1e6)]  # a learning rate
Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, le=1e9)]  # of a term of a loss, or of decay

_UNKNOWN = "extra_forbidden"


def check(key: str, value: Any, kind: Any) -> None:
    """Check a value against the annotation of a task's argument.

    Args:
        key: the key as the user types it, `task.scale`.
        value: what JSON can hold.
        kind: the annotation; one that pydantic cannot check lets every value pass.

    Raises:
        UserError: the value is not legal.
    """
    text = json.dumps(value, default=str)
    if "\\u0000" in text:
        raise UserError(f"{key}={value!r} holds the character NUL; leave it out")
    try:
        adapter = _adapter(kind)
    except PydanticUserError:
        return
    try:
        adapter.validate_json(text)  # as JSON: a list may become a tuple
    except ValidationError as error:
        raise UserError(explain(error, adapter.json_schema(), key)) from None


@functools.lru_cache(maxsize=256)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=STRICT)


def explain(error: ValidationError, schema: Mapping[str, Any], prefix: str = "") -> str:
    """Say in one paragraph what is wrong and what is legal: an unknown key if there is one, else the first error.

    Args:
        error: of a validation.
        schema: the JSON schema of what was validated.
        prefix: dotted key of it.
    """
    found = min(error.errors(include_url=False), key=lambda entry: entry["type"] != _UNKNOWN)
    key = prefix
    for part in found["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    if found["type"] == _UNKNOWN:
        return unknown_key(key, dotted_keys(schema, prefix))
    if found["type"] == "missing":
        return f"{key} is missing; give it a value, as configs/run.yaml and its groups do"
    node, value = schema_at(schema, found["loc"]), found["input"]
    kind = node.get("type")
    if "properties" in node:
        names = ", ".join(node["properties"])
        return f"{key}={value!r}: {key} is a section, with the keys {names}; set one of them"
    if "enum" in node or "const" in node:
        words = node.get("enum", [node.get("const")])
        return f"{key}={value!r} is not one of {', '.join(words)}{closest(str(value), words)}"
    if kind == "array":
        return f"{key}={value!r} is not a list; type it as {key}=[...]"
    if kind == "object":
        return f"{key}={value!r} is a section of keys; set one of them with {key}.KEY=VALUE"
    advice = "; quote what YAML reads as something else" if kind == "string" and "legal" not in node else ""
    return f"{key}={value!r} is not {legal(schema_at(schema, found['loc'], optional=True)) or found['msg']}{advice}"


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that there is no such key, which one is most similar, and which are legal.

    Args:
        key: dotted.
        known: all dotted keys, sections included.
    """
    section, _, name = key.rpartition(".")
    siblings = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == section]
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    # Names alone are compared: with a long section before them all would look alike
    advice = f"; did you mean {elsewhere[0]!r}?" if elsewhere else closest(name, siblings)
    if not elsewhere and section and advice:
        advice = advice.replace("mean '", f"mean '{section}.", 1)
    if not section or not siblings:
        section, siblings = "", [path for path in known if "." not in path]
    advice += f"; the keys{f' of {section}' if section else ''} are {', '.join(siblings)}"
    if section == "task":
        advice += f"; for an argument of a task of your own that its YAML does not give, type +{key}=..."
    return f"unknown key {key!r}{advice}"


def dotted_keys(schema: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted names of all keys of a JSON schema, sections before what they hold."""
    found = []

    def visit(node: Mapping[str, Any], path: str) -> None:
        for name in node.get("properties", {}):
            inner = f"{path}.{name}" if path else name
            found.append(inner)
            visit(_resolved(node["properties"][name], schema), inner)

    visit(_resolved(schema, schema), prefix)
    return found


def schema_at(schema: Mapping[str, Any], path: Sequence[str | int], optional: bool = False) -> Mapping[str, Any]:
    """Find the part of a JSON schema for a key; empty where there is none. optional: with its `null`, if it has one."""
    node: Mapping[str, Any] = schema
    for part in path:
        node = _resolved(node, schema)
        node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
    return node if optional else _resolved(node, schema)


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node or "anyOf" in node:
        if "anyOf" in node:
            node = next((part for part in node["anyOf"] if part.get("type") != "null"), {})
        else:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    return node


def legal(node: Mapping[str, Any]) -> str:
    """Describe the legal values of a key from its JSON schema: `a whole number of bits in [2, 16], or null`."""
    if "anyOf" in node:
        return ", or ".join(filter(None, map(legal, node["anyOf"])))
    kind, unit = node.get("type"), node.get("unit", "")
    if "legal" in node:
        return str(node["legal"])
    if "enum" in node:
        return f"one of {', '.join(node['enum'])}"
    if kind in ("integer", "number"):
        number = "a whole number" if kind == "integer" else "a number"
        return f"{number}{f' of {unit}' if unit else ''}{_range(node)}"
    words = {"boolean": "true or false", "string": "text", "null": "null"}
    return words.get(str(kind), "")


def _range(node: Mapping[str, Any]) -> str:
    low, high = (_number(node, name) for name in ("minimum", "maximum"))
    if low is None:
        return "" if high is None else f" {'<=' if 'maximum' in node else '<'} {high}"
    if high is None:
        return f" {'>=' if 'minimum' in node else '>'} {low}"
    left, right = "[" if "minimum" in node else "(", "]" if "maximum" in node else ")"
    return f" in {left}{low}, {high}{right}"


def _number(node: Mapping[str, Any], name: str) -> str | None:
    value = node.get(name, node.get(f"exclusive{name.title()}"))
    return value if value is None else str(value) if isinstance(value, int) else f"{value:.15g}"
