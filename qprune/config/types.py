"""Legal values of config keys: types with a range and a unit, and their errors.

The schema uses these types for the keys of every run, a task for the arguments of its constructor:
`batch_size: Samples = 128`, or `blocks: Annotated[int, Field(ge=1, le=100)] = 9`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from qprune.errors import UserError, closest, most_similar

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
    """Raise UserError unless an annotation allows the value of a task's key."""
    text = json.dumps(value, default=str)
    if "\\u0000" in text:
        raise UserError(f"{key}={value!r} holds the character NUL; leave it out")
    try:
        adapter = TypeAdapter[Any](kind, config=STRICT)
        schema = adapter.json_schema()
    except PydanticUserError:  # an annotation of another kind: every value passes
        return
    try:
        adapter.validate_json(text)  # as JSON: a list may become a tuple
    except ValidationError as error:
        raise UserError(explain(error, schema, key)) from None


def explain(error: ValidationError, schema: Mapping[str, Any], prefix: str = "") -> str:
    """Say what is wrong and what is legal: of an unknown key, else the first error.

    schema: the JSON schema of what was validated; prefix: its dotted key.
    """
    found = min(error.errors(include_url=False), key=lambda entry: entry["type"] != _UNKNOWN)
    key, node, value = prefix, _resolved(schema, schema), found["input"]
    optional: Mapping[str, Any] = schema  # with its `null`
    parent = node
    for part in found["loc"]:
        if isinstance(part, str) and "properties" not in node:
            break  # a member of a union
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
        parent = node
        optional = node.get("items", {}) if isinstance(part, int) else node["properties"].get(part, {})
        node = _resolved(optional, schema)
    if found["type"] == _UNKNOWN:
        siblings = [f"{key.rpartition('.')[0]}.{name}".lstrip(".") for name in parent["properties"]]  # in a list
        return unknown_key(key, list(dict.fromkeys([*dotted_keys(schema, prefix), *siblings])))
    if found["type"] == "missing":
        return f"{key} is missing; give it a value" + ("" if prefix else ", as configs/run.yaml and its groups do")
    if "properties" in node:
        names = ", ".join(node["properties"])
        return f"{key}={value!r}: {key} is a section, with the keys {names}; set one of them"
    if words := _words(node):
        return f"{key}={value!r} is not one of {', '.join(words)}{closest(str(value), words)}"
    advice = {
        "array": f"a list; type it as {key}=[...]",
        "object": f"a section of keys; set one of them with {key}.KEY=VALUE",
        "string": f"{legal(optional)}; quote what YAML reads as something else",
    }
    kind = "" if "legal" in node else node.get("type", "")
    return f"{key}={value!r} is not {advice.get(kind) or legal(optional) or found['msg']}"


def unknown_key(key: str, known: Sequence[str]) -> str:
    """Say that there is no such key, which one is similar, and which are `known`."""
    section, _, name = key.rpartition(".")
    siblings = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == section]
    if not siblings:
        section, siblings = "", [path for path in known if "." not in path]
    elsewhere = [path for path in known if path.rpartition(".")[2] == name]
    # Names alone are compared: with a long section before them all would look alike
    similar = elsewhere or [f"{section}.{word}".lstrip(".") for word in most_similar(name, siblings)]
    advice = f"; did you mean {similar[0]!r}?" if similar else ""
    advice += f"; the keys{f' of {section}' if section else ''} are {', '.join(siblings)}"
    if section == "task":
        advice += f"; for an argument of a task of your own that its YAML does not give, type +{key}=..."
    return f"unknown key {key!r}{advice}"


def dotted_keys(schema: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted names of all keys of a JSON schema, sections first."""
    found = []

    def visit(node: Mapping[str, Any], path: str) -> None:
        for name, child in node.get("properties", {}).items():
            inner = f"{path}.{name}" if path else name
            found.append(inner)
            visit(_resolved(child, schema), inner)

    visit(_resolved(schema, schema), prefix)
    return found


def schema_at(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Find the part of a JSON schema for a dotted key; empty where there is none."""
    node: Mapping[str, Any] = schema
    for name in key.split("."):
        node = _resolved(node, schema).get("properties", {}).get(name, {})
    return node


def _resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow references, and leave out `null` where it is the only alternative."""
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
            continue
        others = [part for part in node["anyOf"] if part.get("type") != "null"]
        if len(others) != 1:
            break
        node = others[0]
    return node


def legal(node: Mapping[str, Any]) -> str:
    """Describe legal values: `a whole number of bits in [2, 16], or null`."""
    if "anyOf" in node:
        found = [*filter(None, map(legal, node["anyOf"]))]
        return "" if found == ["null"] else ", or ".join(found)
    if "legal" in node:
        return str(node["legal"])
    if words := _words(node):
        return f"one of {', '.join(words)}"
    kind = str(node.get("type"))
    words_of_kinds = {"boolean": "true or false", "string": "text", "null": "null"}
    if kind not in ("integer", "number"):
        return words_of_kinds.get(kind, "")
    unit = f" of {node['unit']}" if "unit" in node else ""
    return f"{'a whole number' if kind == 'integer' else 'a number'}{unit}{_range(node)}"


def _words(node: Mapping[str, Any]) -> list[str]:
    return [str(word) for word in node.get("enum", [node["const"]] if "const" in node else [])]


def _range(node: Mapping[str, Any]) -> str:
    low, high = node.get("minimum", node.get("exclusiveMinimum")), node.get("maximum", node.get("exclusiveMaximum"))
    shown = [str(limit) if isinstance(limit, int) else f"{limit:.15g}" for limit in (low or 0, high or 0)]
    if high is None:
        return "" if low is None else f" {'>=' if 'minimum' in node else '>'} {shown[0]}"
    if low is None:
        return f" {'<=' if 'maximum' in node else '<'} {shown[1]}"
    return f" in {'[' if 'minimum' in node else '('}{', '.join(shown)}{']' if 'maximum' in node else ')'}"
