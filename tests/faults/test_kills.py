"""Runs that are killed (SIGKILL) in the middle of anything and started again end with the same bits, and count once."""

import json
import multiprocessing
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from qprune.config import signature as identity
from qprune.runs.folder import read_rows
from tests.faults.attempts import Death, attempt
from tests.faults.conftest import LONG
from tests.faults.fuzzing import check_all
from tests.faults.recipes import config_of, small

# Kills per task; a run is killed up to three times before it is left alone.
KILLS = {"espcn": 100, "cifar": 42, "cyclegan": 63} if LONG else {"espcn": 6}
KILLS_PER_RUN = 3
# Checkpoints after every step, every third of a second, or at the end alone
MINUTES = (0.0, 0.005, 5.0)
EQUAL = ("result.json", "network.safetensors", "metrics.csv", "operators.json")

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.faults.attempts"])


def run(
    config: dict[str, Any], notes: Path, death: Death | None = None, delay: float | None = None, order: int = 0
) -> int:
    """Carry out an attempt in a forked process, killed after `delay` seconds if given. Returns its exit code."""
    process = server.Process(target=attempt, args=(config, death, str(notes), order))
    process.start()
    if delay is not None:
        process.join(delay)
        process.kill()
    process.join(300)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@dataclass
class Tally:
    """What became of the runs: kills by place, checkpoints torn, runs that ended equal, rows that are not one a run."""

    kills: Counter[str] = field(default_factory=Counter)
    torn: int = 0
    equal: int = 0
    differing: list[str] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0


def files_of(config: dict[str, Any]) -> dict[str, bytes]:
    """The files of a run that must not differ, once their checksums are found right."""
    folder = identity.run_folder(OmegaConf.create(config))
    assert check_all(folder) == []
    return {name: (folder / name).read_bytes() for name in EQUAL}


def deaths(counts: dict[str, int], chance: random.Random) -> Iterator[Death]:
    """Places to die at: each name in turn, so that rare ones (the final write) come as often as frequent ones."""
    names = sorted(counts)
    chance.shuffle(names)
    while True:
        for name in names:
            yield Death(name, chance.randint(1, counts[name]))


def tear_newest(folder: Path, chance: random.Random) -> bool:
    """Cut the newest checkpoint or warm start below `folder` short, as a disk may that lost power."""
    saved = sorted(folder.rglob("step-*.pt"), key=lambda path: path.name)
    if saved:
        saved[-1].write_bytes(saved[-1].read_bytes()[: chance.randrange(saved[-1].stat().st_size)])
    return bool(saved)


def killed_and_resumed(task: str, kills: int, folder: Path, seed: int) -> Tally:
    """Kill runs of `task` until `kills` is reached, each `KILLS_PER_RUN` times, and let each end.

    Two recipes take turns in one folder of results, so that the second starts from the first one's float prefix.
    """
    chance, tally = random.Random(seed), Tally()
    recipes = (small(task), small(task, "quantize.bits=6"))
    expected, measured = [], {"counts": Counter[str](), "seconds": 0.0}
    for index, recipe in enumerate(recipes):
        whole = folder / f"whole{index}"
        config = config_of(*recipe, f"results_dir={whole}/runs", "trainer.checkpoint_minutes=0")
        assert run(config, whole) == 0, (whole / "output.txt").read_text()
        expected.append(files_of(config))
        measured = json.loads((whole / "places.json").read_text())
    places = deaths(measured["counts"], chance)
    number = 0
    while tally.kills.total() < kills or number % 2:
        turn, place = number % 2, folder / f"pair{number // 2}"
        minutes = f"trainer.checkpoint_minutes={MINUTES[number // 2 % len(MINUTES)]}"
        config = config_of(*recipes[turn], f"results_dir={place}/runs", minutes)
        for _ in range(min(KILLS_PER_RUN, kills - tally.kills.total())):
            death, delay = next(places), None
            if chance.random() < 0.25:
                death, delay = Death("any moment", 0), chance.uniform(0, measured["seconds"])
            code = run(config, place, death, delay)
            assert code in (0, -signal.SIGKILL), (place / "output.txt").read_text()
            tally.kills[death.name] += code == -signal.SIGKILL
            if code and chance.random() < 0.2:
                tally.torn += tear_newest(place, chance)
        assert run(config, place) == 0, (place / "output.txt").read_text()
        found = files_of(config)
        differing = [name for name in EQUAL if found[name] != expected[turn][name]]
        tally.equal += not differing
        tally.differing += [f"{place}: {name}" for name in differing]
        assert not list(place.rglob("runs/*/*/.*.tmp")), "half-written files are left"
        assert not list(place.rglob("checkpoints")), "checkpoints are left"
        rows, problems = read_rows(place)
        tally.lost += max(0, turn + 1 - len(rows))
        tally.doubled += max(0, len(rows) - turn - 1) + len(problems)
        number += 1
    return tally


@pytest.mark.parametrize("part", range(2 if LONG else 1))
@pytest.mark.parametrize("task", KILLS)
def test_killed_runs_end_with_equal_bits(task: str, part: int, tmp_path: Path, figure: Callable[[str], None]) -> None:
    parts = 2 if LONG else 1
    started = time.monotonic()
    tally = killed_and_resumed(task, -(-KILLS[task] // parts), tmp_path, seed=part)
    assert tally.differing == []
    assert (tally.lost, tally.doubled) == (0, 0)
    figure(
        f"{task}: {tally.kills.total()} kills at {len(tally.kills)} kinds of place, {tally.equal} runs resumed to "
        f"identical bits, past {tally.torn} torn checkpoints; {tally.lost} rows lost, {tally.doubled} counted twice "
        f"({time.monotonic() - started:.0f} s)"
    )
    if LONG:
        figure(f"  {', '.join(f'{place} {count}' for place, count in sorted(tally.kills.items()))}")
