"""No link of the built pages leads nowhere: each is followed within the files, offline, when the build is done.

Links to other sites are not followed; they are few, and a build must not need a network.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


def dead_links(folder: Path) -> list[str]:
    """`page: link` for each link below `folder` to a file or an anchor that is not there."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    dead = []
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            fragment = unquote(parts.fragment)
            missing = fragment and target in pages and fragment not in pages[target].anchors
            if not target.exists() or missing:
                dead.append(f"{path.relative_to(folder.resolve())}: {link}")
    return dead


def check(app: Any, error: Exception | None) -> None:
    """Sphinx's event `build-finished`: fail for a dead link."""
    from sphinx.errors import ExtensionError

    if error is None and app.builder.format == "html" and (dead := dead_links(Path(app.outdir))):
        raise ExtensionError("dead links:\n  " + "\n  ".join(dead))


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True}
