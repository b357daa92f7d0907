"""Where tables and reports are written: below results_dir, under names that say of which rows they are."""

import re
from collections.abc import Sequence
from pathlib import Path

from qprune.config.compose import key_of
from qprune.config.signature import MACHINE_KEYS, short_hash
from qprune.errors import UserError

DEFAULT_RESULTS = "results/runs"
RESULTS_DIR = "results_dir"
_OF_NO_ROW = (*MACHINE_KEYS, "task", "seed")  # they choose among the rows of a table, or change no row
_LONGEST = 80  # letters


def results_folder(keys: Sequence[str]) -> Path:
    """Return the folder that `results_dir=...` among the keys names, or the default one.

    Raises:
        UserError: a folder was named and is not there.
    """
    given = [key.partition("=")[2] for key in keys if key_of(key) == RESULTS_DIR]
    folder = Path(given[-1] if given else DEFAULT_RESULTS)
    if given and not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that holds the runs with {RESULTS_DIR}=...")
    return folder


def table_file(name: str, keys: Sequence[str]) -> str:
    """Name the files of a table: one name for each budget, data and further key that holds for its rows.

    `table4` is of the paper's budget on real data; others are as `table4-smoke-synthetic`.
    """
    own = {key_of(key): key for key in keys if key_of(key) not in _OF_NO_ROW}
    values = [own.pop(key).partition("=")[2] for key in ("budget", "data") if key in own]
    parts = [value for value in values if value not in ("paper", "real")] + [own[key] for key in sorted(own)]
    text = "-".join(re.sub("[^0-9A-Za-z.]+", "_", part).strip("_") for part in (f"table{name}", *parts))
    return text if len(text) <= _LONGEST else f"table{name}-{short_hash(parts)}"
