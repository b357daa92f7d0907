"""Read the pages of the documentation: fenced blocks, and the modules of docs/extensions."""

import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
_OPTION = re.compile(r":[\w-]+:")


@dataclass(frozen=True)
class Block:
    """A fenced block: language, options of a directive as they stand, and text."""

    language: str
    options: str
    text: str

    @property
    def caption(self) -> str:
        """The file that the block is said to be."""
        found = re.search(r":caption: (.*)", self.options)
        return found[1] if found else ""


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the blocks of a page in some languages, in order, without directives other than `code-block`."""
    found: list[Block] = []
    head: str | None = None
    lines: list[str] = []
    for line in (DOCS / f"{page}.md").read_text(encoding="utf-8").splitlines():
        if head is None and line.startswith("```"):
            head, lines = line.removeprefix("```").removeprefix("{code-block} "), []
        elif line == "```" and head is not None:
            options = [text for text in lines if _OPTION.match(text)]
            text = "\n".join(lines[len(options) :]).lstrip("\n")
            found.append(Block(head, "\n".join(options), f"{text}\n"))
            head = None
        else:
            lines.append(line)
    return [block for block in found if block.language in languages]


def extension(name: str) -> Any:
    """Import a module of docs/extensions."""
    sys.path.insert(0, str(DOCS / "extensions"))
    try:
        spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "extensions" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(DOCS / "extensions"))
