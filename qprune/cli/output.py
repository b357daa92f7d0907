"""What the command line prints, and where it writes tables and reports: below results_dir, named by their rows."""

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from qprune.config.compose import Composer, key_of
from qprune.config.signature import MACHINE_KEYS, short_hash
from qprune.errors import UserError

DEFAULT_RESULTS = "results/runs"
RESULTS_DIR = "results_dir"
_OF_NO_ROW = (*MACHINE_KEYS, "task", "seed")  # they choose among the rows of a table, or change no row
_LONGEST = 80  # letters


def fold(line: str, indent: int) -> str:
    """Break a line between words at the width of a terminal; elsewhere it stays one line, to be searched."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(line) + 1
    return textwrap.fill(line, width, subsequent_indent=" " * indent)


def results_folder(keys: Sequence[str]) -> tuple[Path, list[str]]:
    """Return the folder that `results_dir=...` among KEY=VALUE names, or the default one, and the other keys."""
    given = [key for key in keys if key_of(key) == RESULTS_DIR]
    with Composer() as composer:
        folder = Path(composer.values(given).get(RESULTS_DIR, DEFAULT_RESULTS))
    return folder, [key for key in keys if key not in given]


def existing_results(keys: Sequence[str], make: bool = False) -> tuple[Path, list[str]]:
    """As `results_folder`; a folder that is named and not there raises UserError, unless `make` creates it."""
    folder, others = results_folder(keys)
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    if len(others) < len(keys) and not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds the runs with {RESULTS_DIR}=...")
    return folder, others


def table_file(name: str, keys: Sequence[str]) -> str:
    """Name the files of a table: one name for each budget, data and further key that holds for its rows.

    `table4` is of the paper's budget on real data; others are as `table4-smoke-synthetic`.
    """
    own = {key_of(key): key for key in keys if key_of(key) not in _OF_NO_ROW}
    values = [own.pop(key).partition("=")[2] for key in ("budget", "data") if key in own]
    parts = [value for value in values if value not in ("paper", "real")] + [own[key] for key in sorted(own)]
    text = "-".join(re.sub("[^0-9A-Za-z.]+", "_", part).strip("_") for part in (f"table{name}", *parts))
    return text if len(text) <= _LONGEST else f"table{name}-{short_hash(parts)}"
