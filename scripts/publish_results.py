"""Copy the rows of finished runs to results/published: python scripts/publish_results.py [RESULTS_DIR]"""

from __future__ import annotations

import sys
from pathlib import Path

from qprune.errors import UserError
from qprune.reporting.publishing import publish


def main(arguments: list[str]) -> int:
    """Publish and say what is new. Exit code 1 when rows were left out, 2 when there is nothing to read."""
    try:
        folder, new, problems = publish(Path(arguments[0] if arguments else "results/runs"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(new)} new rows in {folder}")
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
