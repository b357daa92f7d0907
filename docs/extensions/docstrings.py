"""Text of the code for the pages."""

from __future__ import annotations

import re


def without_sources(text: str) -> str:
    """Remove references to notes that readers of the pages do not have."""
    return re.sub(r" \(spec [^)]*\)", "", text)
