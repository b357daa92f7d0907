"""Rows for others to see: the light files of finished runs, copied to a folder that is committed with the project.

Networks and checkpoints stay where they are, and so does what tells of the machine's folders.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from qprune.atomic_write import write_atomically, write_json
from qprune.config.signature import MACHINE_KEYS
from qprune.runs.folder import CONFIG_FILE, ENVIRONMENT_FILE, METRICS_FILE, PUBLISHED, ROW_FILE, RunFolder
from qprune.runs.store import Store

COPIED = (METRICS_FILE, "operators.json", "histograms.json", "timing.json")
# Folders of one machine, and what stands for them in a published config.
_PLACES = {"results_dir": "results/runs", "data.root": "data"}


def publish(results_dir: Path) -> tuple[Path, list[str], list[str]]:
    """Copy the good rows below `results_dir` to the folder `published` beside it; what is there already stays.

    Pictures are copied for the seed 0 alone. Returns the folder, the names of the runs that are new in it, and what is
    wrong with rows that were left out. Raises UserError when there is nothing to read.
    """
    target = results_dir.parent / PUBLISHED
    store = Store.read(results_dir)
    own = [signature for signature, run in store.folders.items() if run.path.is_relative_to(results_dir)]
    store.check(own)
    new = []
    for signature in own:
        source = store.folders[signature].path
        folder = target / source.relative_to(results_dir)
        if signature not in store.rows or (folder / ROW_FILE).exists():
            continue
        if config := RunFolder(source).config():
            text = yaml.safe_dump(_without_places(config), sort_keys=False)
            write_atomically(folder / CONFIG_FILE, text.encode())
        if (source / ENVIRONMENT_FILE).exists():
            environment = json.loads((source / ENVIRONMENT_FILE).read_bytes())
            environment["command"] = [word for word in environment["command"] if not _is_place(word)]
            write_json(folder / ENVIRONMENT_FILE, environment)
        if store.rows[signature].seed == 0 and (source / "pictures").is_dir():
            shutil.copytree(source / "pictures", folder / "pictures", dirs_exist_ok=True)
        for name in COPIED:
            if (source / name).exists():
                write_atomically(folder / name, (source / name).read_bytes())
        row = (source / ROW_FILE).read_bytes()
        # Checksums of their own, since configs differ; those of the run's folder were looked at by the store.
        there = [name for name in (CONFIG_FILE, *COPIED) if (folder / name).exists()]
        RunFolder(folder).write_sums(there, **{ROW_FILE: row})
        write_atomically(folder / ROW_FILE, row)  # last: it says 'whole'
        new.append(str(folder.relative_to(target)))
    return target, new, store.problems


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the defaults of keys that name folders of one machine."""
    data = {**config["data"], "root": _PLACES["data.root"]}
    return {**config, "data": data, "results_dir": _PLACES["results_dir"]}


def _is_place(word: str) -> bool:
    """Whether a word of a command says where or how a run was carried out, not what it is."""
    return word.partition("=")[0].lstrip("+") in MACHINE_KEYS
