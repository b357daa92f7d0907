"""Copy the light files of finished runs to results/published: python scripts/publish_results.py [RESULTS_DIR]"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import yaml

from qprune.atomic_write import write_atomically, write_json
from qprune.config.signature import MACHINE_KEYS
from qprune.errors import UserError
from qprune.runs import folder as run_files
from qprune.runs.store import Store

COPIED = (run_files.METRICS_FILE, run_files.OPERATORS_FILE, run_files.HISTOGRAMS_FILE, run_files.TIMING_FILE)


def publish(results_dir: Path) -> tuple[Path, list[str], list[str]]:
    """Copy good rows to the folder `published`, without paths of the machine.

    What is there already stays, unless its arithmetic is older.

    Pictures are copied for the seed 0 alone.

    Returns:
        The folder, the names of the runs that are new in it, and what is wrong with rows that were left out.

    Raises:
        UserError: There is nothing to read.
    """
    target = results_dir.parent / run_files.PUBLISHED
    store = Store.read(results_dir)
    own = [signature for signature, run in store.folders.items() if run.path.is_relative_to(results_dir)]
    store.check(own)
    new = []
    for signature in own:
        source = store.folders[signature].path
        folder = target / source.relative_to(results_dir)
        if signature not in store.rows:
            continue
        if (there := run_files.RunFolder(folder)).finished:
            if there.row().arithmetic >= store.rows[signature].arithmetic:
                continue
            shutil.rmtree(folder)
        if config := store.stored(signature, run_files.RunFolder.config):
            config |= {"data": config["data"] | {"root": "data"}, "results_dir": "results/runs"}  # of no machine
            write_atomically(folder / run_files.CONFIG_FILE, yaml.safe_dump(config, sort_keys=False).encode())
        if (source / run_files.ENVIRONMENT_FILE).exists():
            environment = json.loads((source / run_files.ENVIRONMENT_FILE).read_bytes())
            words = environment["command"]
            environment["command"] = [w for w in words if w.partition("=")[0].lstrip("+") not in MACHINE_KEYS]
            write_json(folder / run_files.ENVIRONMENT_FILE, environment)
        if store.rows[signature].seed == 0 and (source / run_files.PICTURES).is_dir():
            shutil.copytree(source / run_files.PICTURES, folder / run_files.PICTURES, dirs_exist_ok=True)
        for name in COPIED:
            if (source / name).exists():
                write_atomically(folder / name, (source / name).read_bytes())
        row = (source / run_files.ROW_FILE).read_bytes()  # without the marks that a store adds
        # Checksums of their own, since configs differ; the store has checked those of the run's folder.
        present = [path for path in folder.rglob("*") if path.is_file() and path.name != run_files.SUMS_FILE]
        sums = {str(path.relative_to(folder)): run_files.sum_of(path.read_bytes()) for path in present}
        run_files.RunFolder(folder).write_sums(sums | {run_files.ROW_FILE: run_files.sum_of(row)})
        write_atomically(folder / run_files.ROW_FILE, row)  # last: a folder with a row is complete
        new.append(str(folder.relative_to(target)))
    return target, new, store.problems


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
