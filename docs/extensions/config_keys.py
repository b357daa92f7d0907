"""The directive `config-keys`: tables of config keys, made when docs are built.

Values come from the YAML files in `configs/`; what a key means, its unit and its range from the schema, and for the
arguments of a task from the comment on the key's line or above it (a test holds that each has one).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from qprune.config.schema import MACHINE_KEYS, json_schema
from qprune.config.types import legal, schema_at

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Key:
    """A key with its dotted path, its default as it is written, and what it means: unit and range."""

    path: str
    default: str
    meaning: str


def keys_of(file: Path) -> list[Key]:
    """Return all keys of a file whose values are no sections, in order; without Hydra's."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    prefix = "schedule." if "# @package schedule" in lines[0] else ""
    if file.parent.name in ("budget", "data", "trainer", "logger", "order"):
        prefix = f"{file.parent.name}."
    elif file.parent.name == "launcher":
        prefix = "hydra.launcher."
    return [
        Key(prefix + path, _written(value), _comment(lines, key.start_mark.line) or _meaning(prefix + path))
        for path, key, value in _leaves(yaml.compose(text))
    ]


def _meaning(path: str) -> str:
    """Return what the schema says of a key: description, unit and range."""
    node = schema_at(json_schema(), path)
    found = legal(node)
    return f"{node.get('description', '')}{f': {found}' if found else ''}"


def summary_of(file: Path) -> str:
    """Return the first line of a file, which describes it."""
    first = next(line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @"))
    return first.removeprefix("# ")


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        inner = f"{path}.{key.value}" if path else key.value
        if isinstance(value, yaml.MappingNode) and key.value != "hydra":
            yield from _leaves(value, inner)
        elif key.value not in ("hydra", "defaults", "_target_"):
            yield inner, key, value


def _written(value: yaml.Node) -> str:
    text: str = value.start_mark.buffer[value.start_mark.pointer : value.end_mark.pointer]
    return text.strip() if isinstance(value, yaml.ScalarNode) else " ".join(text.split())


def _comment(lines: list[str], number: int) -> str:
    """Return the comment on the line; where there is none, the block above."""
    _, mark, text = lines[number].partition(" # ")
    if mark:
        return text.strip()
    above = []
    while number > 0 and lines[number - 1].strip().startswith("# "):
        number -= 1
        above.append(lines[number].strip().removeprefix("# "))
    return " ".join(reversed(above))


def markdown_table(keys: list[Key]) -> str:
    """Write key, default and meaning as a table."""
    rows = ["| key | default | what it means: unit and range |", "| --- | --- | --- |"]
    for key in keys:
        meaning = escaped(key.meaning)
        machine = " *(machine key)*" if key.path in MACHINE_KEYS else ""
        rows.append(f"| `{key.path}` | `{key.default}` | {meaning}{machine} |".replace("| `` |", "| |"))
    return "\n".join(rows)


def schedule_table(configs: Path = CONFIGS) -> str:
    """Write the schedules as a table, a row for each file and a column for each key; slots have no row."""
    files = sorted(path for path in (configs / "schedule").rglob("*.yaml") if path.parent.name != "slots")
    names = [key.path.removeprefix("schedule.") for key in keys_of(files[0])]
    rows = [f"| schedule | {' | '.join(f'`{name}`' for name in names)} |", f"|{' --- |' * (len(names) + 1)}"]
    for file in files:
        cells = [key.default.replace("null", "-") for key in keys_of(file)]
        rows.append(f"| `{file.relative_to(configs / 'schedule').with_suffix('')}` | {' | '.join(cells)} |")
    return "\n".join(rows)


def choices_table(group: str, configs: Path = CONFIGS) -> str:
    """Write the choices of a group as a table, with what each is."""
    rows = [f"| `{group}=` | |", "| --- | --- |"]
    rows += [f"| `{file.stem}` | {escaped(summary_of(file))} |" for file in sorted((configs / group).glob("*.yaml"))]
    return "\n".join(rows)


def escaped(text: str) -> str:
    """Escape text for a cell of a Markdown table, but for code."""
    inside, pieces = False, []
    for piece in text.split("`"):
        pieces.append(piece if inside else piece.replace("*", r"\*").replace("<", "&lt;").replace("_", r"\_"))
        inside = not inside
    return "`".join(pieces).replace("|", r"\|")


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    from docutils import nodes
    from sphinx.util.docutils import SphinxDirective

    class ConfigKeys(SphinxDirective):
        """`config-keys` FILE, `schedules`, or `choices GROUP`."""

        required_arguments = 1
        final_argument_whitespace = True
        option_spec: ClassVar[dict[str, Any]] = {}

        def run(self) -> list[nodes.Node]:
            """Parse the table's Markdown."""
            for file in CONFIGS.rglob("*.yaml"):
                self.env.note_dependency(str(file))
            word, _, rest = self.arguments[0].partition(" ")
            if word == "schedules":
                text = schedule_table()
            elif word == "choices":
                text = choices_table(rest)
            else:
                text = markdown_table(keys_of(CONFIGS / word))
            box = nodes.container(classes=["config-keys" if self.arguments[0].endswith("yaml") else "choices"])
            box += self.parse_text_to_nodes(text)
            return [box]

    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True}
