"""Stored files that are changed: noticed by their checksums, or, summed again, read by a schema; the rest goes on."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from qprune.config.schema import RunConfig
from qprune.errors import UserError
from qprune.runs.folder import RunFolder
from qprune.runs.jobs import Job, seconds_left
from qprune.runs.store import Store
from qprune.runs.stored import HISTOGRAMS, OPERATORS
from tests.attacks import hostile
from tests.attacks.conftest import TRIALS, Attacks, LostRowError, SilentDifferenceError, verb

JSON_FILES = ("result.json", "operators.json", "histograms.json", "timing.json", "environment.json")
SUMMED = (*JSON_FILES, "config.yaml", "metrics.csv", "plan.csv", "network.safetensors", "pictures/test.png")
TEXTS = (
    *("", "\0", "{", "[]", "null", "3", '"x"', "a: &x [*x]", "&x {a: *x}", "!!python/object/apply:os.system [x]"),
    "\ufeff{}",
    *("a: !!binary xx", "? [a]\n: b", "- a\n b: c", hostile.nested(20), hostile.nested(200), hostile.nested(20000)),
    "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(12)),
    "epoch,step\n1e999,2\n",
    "epoch\n1,2,3\n",
    "epoch,epoch\n1,1\n",
    "epoch,step,phase,loss\n1,3,float,0.1\n" * 2,
    "9" * 5000,
)


def rewritten(draw: random.Random, path: Path) -> None:
    """Write something else into a stored file: of its own kind, or of none."""
    content = path.read_bytes()
    kind = draw.random()
    if kind < 0.2:
        path.write_text(draw.choice(TEXTS), encoding="utf-8")
    elif kind < 0.35:
        data = bytearray(content)
        start = draw.randrange(len(data))
        data[start : start + draw.choice((0, 1, 8, 4096))] = draw.randbytes(draw.choice((0, 1, 8)))
        path.write_bytes(data if data != content else data + b"x")
    elif kind < 0.45:
        path.unlink()
        draw.choice(
            (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(draw.choice(("/dev/zero", "/nowhere", "."))))
        )()
    elif path.suffix == ".json":
        text = json.dumps(hostile.changed(draw, json.loads(content)))
        path.write_text(draw.choice((text, text.replace(": 1", ": 1e999"), text.replace("1", "1" * 400))))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(hostile.changed(draw, yaml.safe_load(content))), encoding="utf-8")
    elif path.suffix == ".csv":
        cells = [line.split(",") for line in content.decode().splitlines()]
        line = draw.choice(cells)
        line[draw.randrange(len(line))] = str(draw.choice(hostile.VALUES))[:300]
        path.write_text("\n".join(",".join(line) for line in cells), encoding="utf-8")
    elif path.suffix == ".safetensors":
        tensors: dict[str, Any] = load_file(path)
        name = draw.choice(sorted(tensors))
        shape = draw.choice(((0,), (), (1, 1), (3, 0, 2), (2, 2, 2)))
        place = draw.choice(
            (name, f"{hostile.name(draw).encode(errors='replace').decode()}.output_operators.pruner.mask")
        )
        with np.errstate(over="ignore"):  # 1e30 in float16
            values = np.full(shape, draw.choice((0.5, np.nan, np.inf, 1e30, -1)))
            tensors[place] = values.astype(draw.choice((np.float32, np.float64, np.float16)))
        save_file(tensors, path)
    else:
        path.write_bytes(draw.randbytes(draw.randrange(1, 200)))


def files_of(run: Path) -> list[Path]:
    return [run / name for name in SUMMED]


def test_a_file_that_is_changed_is_noticed(attacks: Attacks, runs: list[Path], tmp_path: Path) -> None:
    """Every file of a run has its checksum: the report leaves the row out and names the file."""
    for path in files_of(runs[0]):
        assert path.is_file(), path
        assert path.relative_to(runs[0]).as_posix() in (runs[0] / "SHA256SUMS").read_text()

    def trial(draw: random.Random) -> None:
        first, second = fresh(runs, tmp_path / "place")
        path = draw.choice(files_of(first))
        before = path.read_bytes()
        rewritten(draw, path)
        if not path.exists() or (path.is_file() and path.read_bytes() == before):
            return  # a file may be missing
        store = Store.read(first.parents[1])
        store.leave_out_bad(RunFolder.check_all)
        if set(store.rows) - {hostile.row_of(second)["signature"]}:
            raise SilentDifferenceError(f"{path.name} was changed, and the row counts")
        if not store.rows:
            raise LostRowError("the other row")
        assert any(path.name in problem for problem in store.problems), store.problems

    attacks.run("stored file: changed", trial, 3 * TRIALS)


def fresh(runs: list[Path], place: Path) -> list[Path]:
    shutil.rmtree(place, ignore_errors=True)
    return hostile.copied(runs, place / "runs")


Reader = Callable[[str, str], Any]
READERS: dict[str, Reader] = {
    "list": lambda folder, run: verb("list", "runs", f"results_dir={folder}"),
    "list by key": lambda folder, run: verb("list", "runs", f"results_dir={folder}", "seed=0,1"),
    "tables": lambda folder, run: verb("tables", "order", f"results_dir={folder}"),
    "evaluate": lambda folder, run: verb("evaluate", run),
    "export": lambda folder, run: verb("export", run, "--form", "sparse"),
}


def broken(draw: random.Random, runs: list[Path], place: Path) -> tuple[list[Path], Path]:
    """Copy the runs, change a file of the first one, and sum it again or leave it without sums."""
    copies = fresh(runs, place)
    path = draw.choice(files_of(copies[0]))
    rewritten(draw, path)
    (copies[0] / "SHA256SUMS").unlink()
    if draw.random() < 0.5:
        hostile.sum_again(copies[0])
    return copies, path


@pytest.mark.parametrize("name", READERS)
def test_a_wrong_file_that_was_summed_again_breaks_nothing(
    name: str, attacks: Attacks, runs: list[Path], tmp_path: Path
) -> None:
    def trial(draw: random.Random) -> None:
        copies, path = broken(draw, runs, tmp_path / "place")
        answer = READERS[name](str(copies[0].parents[1]), str(copies[0]))
        if name == "list" and "1 run: 1 finished" not in answer.out and "2 runs: 2 finished" not in answer.out:
            raise LostRowError(f"{path.name}: {answer}")
        if name.startswith("list") and answer.code and path.name not in answer.err:
            raise LostRowError(f"{path.name} is not named: {answer}")

    attacks.run(f"stored file: wrong, {name}", trial, 2 * TRIALS)


def test_the_report_goes_on_without_what_is_wrong(attacks: Attacks, runs: list[Path], tmp_path: Path) -> None:
    good = {hostile.row_of(run)["signature"][:10] for run in runs}

    def trial(draw: random.Random) -> None:
        copies, path = broken(draw, runs, tmp_path / "place")
        folder = copies[0].parents[1]
        answer = verb("report", f"results_dir={folder}", "--runs", str(draw.choice((0, 1, 1))))
        page = (folder / "report.html").read_text(encoding="utf-8")
        shown = {name for name in good if f'id="run-{name}"' in page}
        if hostile.row_of(copies[1])["signature"][:10] not in shown:
            raise LostRowError(f"{path.name}: {answer}")
        if len(shown) < len(good) and path.name not in answer.err and path.name != "result.json":
            raise LostRowError(f"a row is left out, and {path.name} is not named: {answer}")

    attacks.run("stored file: wrong, report", trial, -(-TRIALS // 6))


@pytest.mark.parametrize("name", ["operators.json", "histograms.json", "metrics.csv"])
def test_what_a_schema_refuses_is_named(name: str, attacks: Attacks, runs: list[Path], tmp_path: Path) -> None:
    read = {
        "operators.json": "operators.json: ",
        "histograms.json": "histograms.json: ",
        "metrics.csv": "metrics.csv is not the curve of a run",
    }[name]

    def trial(draw: random.Random) -> None:
        first, _ = fresh(runs, tmp_path / "place")
        rewritten(draw, first / name)
        hostile.sum_again(first)
        run = RunFolder(first)
        try:
            if name == "metrics.csv":
                run.metrics()
            elif name == "operators.json":
                run.parsed(name, OPERATORS)
            else:
                run.parsed(name, HISTOGRAMS)
        except UserError as error:
            if not any(text in str(error) for text in (read, "is no file", "cannot be read")):
                raise

    attacks.run(f"stored file: schema of {name}", trial, 3 * TRIALS)


def test_times_that_are_wrong_measure_nothing(attacks: Attacks, runs: list[Path], tmp_path: Path) -> None:
    def trial(draw: random.Random) -> None:
        first, _ = fresh(runs, tmp_path / "place")
        rewritten(draw, first / draw.choice(("timing.json", "config.yaml")))
        (first / "SHA256SUMS").unlink()
        config = RunConfig.check(
            yaml.safe_load((runs[0] / "config.yaml").read_bytes()) | {"results_dir": str(first.parents[1])}
        )
        job = Job((), config, tmp_path / "none", "to do", None)
        assert all(seconds is None or 0 <= seconds < 1e13 for seconds in seconds_left([job]).values())

    attacks.run("stored file: times", trial)


def test_a_mutated_row_is_refused_or_legal(attacks: Attacks, runs: list[Path], tmp_path: Path) -> None:

    def trial(draw: random.Random) -> None:
        first, second = fresh(runs, tmp_path / "place")
        (first / "SHA256SUMS").unlink()
        rewritten(draw, first / "result.json")
        answer = verb("list", "runs", f"results_dir={first.parents[1]}")
        if second.name not in answer.out:
            raise LostRowError(str(answer))

    attacks.run("stored file: row", trial, 2 * TRIALS)
