"""Docstrings as they stand in the code, made readable for Sphinx: `code` is code, and what explains names is a list."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

_FIELD = re.compile(r"^(\w+(?:_\*|\*)?(?:, \w+)*): (?=\S)")
# Where a number or rule comes from: notes for who works on the code, which a reader of these pages does not have
_SPEC = re.compile(r" \(spec [\d., and]+\)|; spec [\d., and]+(?=\))")


def converted(lines: list[str], names: Collection[str] = ()) -> list[str]:
    """Lines of reStructuredText for those of a docstring. names: those of parameters, which may stand in a sentence."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    out: list[str] = []
    for paragraph in filter(None, paragraphs):
        text, items = _items(paragraph, names)
        if text:
            out += [_literal(text), ""]
        out += [f"* {_literal(item)}" for item in items]
        out += [""] if items else []
    return out


def without_sources(text: str) -> str:
    """`text` without references to the notes on where things come from."""
    return _SPEC.sub("", text)


def _items(paragraph: list[str], names: Collection[str]) -> tuple[str, list[str]]:
    """The text of a paragraph, and what it says of single names: `name: ...`, on lines or in sentences of their own."""
    if sum(bool(_FIELD.match(line)) for line in paragraph) >= 2:
        lines = [line if _FIELD.match(line) else f" {line.strip()}" for line in paragraph]
        blocks = "".join(f"\n{line}" if _FIELD.match(line) else line for line in lines).split("\n")
        pieces = [piece for block in blocks for piece in _split(block.strip(), names)]
    else:
        pieces = _split(" ".join(line.strip() for line in paragraph), names)
    text = [piece for piece in pieces if not _FIELD.match(piece)]
    items = []
    for piece in pieces:
        if match := _FIELD.match(piece):
            code = ", ".join(f"`{name}`" for name in match[1].split(", "))
            items.append(f"{code}: {piece[match.end() :]}")
    if len(items) == 1 and not text and not names:
        return " ".join(pieces), []
    return " ".join(text), items


def _split(text: str, names: Collection[str]) -> list[str]:
    """Cut a text where a sentence begins with `name: ` or `name, other: ` of known names."""
    if not names:
        return [text]
    name = "|".join(re.escape(known) for known in names)
    return [piece.strip() for piece in re.split(rf"(?:^|(?<=[.)] ))(?=(?:{name})(?:, (?:{name}))*: )", text) if piece]


def _literal(text: str) -> str:
    """Text in which only `code` has a meaning."""
    pieces = without_sources(text).split("`")
    if len(pieces) % 2 == 0:  # a lone mark: leave it as a character
        return re.sub(r"([*_|`\\])", r"\\\1", text)
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([*_|\\])", r"\\\1", pieces[i])
    out = pieces[0]
    for i in range(1, len(pieces), 2):
        after = pieces[i + 1]
        # reStructuredText ends code only before a space or a mark of punctuation
        glue = r"\ " if re.match(r"\w", after) else ""
        before = r"\ " if re.search(r"[\w^]$", out) else ""
        out += f"{before}``{pieces[i]}``{glue}{after}"
    return out


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event `autodoc-process-docstring`: changes `lines` in place."""
    try:
        names = [*inspect.signature(obj).parameters]
    except (TypeError, ValueError):
        names = []
    lines[:] = converted(lines, names)


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
