"""Several processes: signals of a scheduler, the same run started twice, ranks that die, and ranks against one."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from qprune.config import signature as identity
from qprune.runs.folder import read_rows
from tests.faults.attempts import attempt
from tests.faults.conftest import LONG
from tests.faults.recipes import config_of, small
from tests.faults.test_kills import EQUAL, files_of, run, server

# a run of some seconds, so that there is time to interfere
SLOW = ("budget.steps_per_epoch=100", "prune.window=6", "trainer.checkpoint_minutes=0.002")


class Forked:
    """A run in a process forked from one that has imported torch."""

    def __init__(self, place: Path, notes: str, *overrides: str) -> None:
        self.notes = place / notes
        self.process = server.Process(target=attempt, args=(config_of(*overrides), None, str(self.notes)))
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def wait(self, seconds: float = 300) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode

    @property
    def output(self) -> str:
        path = self.notes / "output.txt"
        return path.read_text() if path.exists() else ""


class Typed:
    """A run as a user types it, in a process of its own."""

    def __init__(self, place: Path, notes: str, *overrides: str) -> None:
        self.path = place / f"{notes}.txt"
        place.mkdir(exist_ok=True)
        with self.path.open("w") as output:
            command = [str(Path(sys.executable).parent / "qprune"), "run", *overrides]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        self.pid = self.process.pid

    def wait(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)

    @property
    def output(self) -> str:
        return self.path.read_text()


def until(condition: Callable[[], Any], seconds: float = 240) -> Any:
    """Wait until `condition` holds, and return what it gave."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never came to it"
        time.sleep(0.02)
    return value


def saved(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("start", [Forked, Typed] if LONG else [Forked])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT] if LONG else [signal.SIGTERM])
def test_a_scheduler_s_signal_and_a_second_process(start: Any, number: signal.Signals, tmp_path: Path) -> None:
    """The first is told to stop; one beside it is refused; another waits, goes on from where it stopped, and ends."""
    recipe = small("espcn", *SLOW)
    config = config_of(*recipe, f"results_dir={tmp_path}/runs")
    folder = identity.run_folder(OmegaConf.create(config))
    first = start(tmp_path, "first", *recipe, f"results_dir={tmp_path}/runs")
    until(lambda: saved(folder))
    os.kill(first.pid, signal.SIGSTOP)  # it must not come to its end before another has been refused
    refused = start(tmp_path, "refused", *recipe, f"results_dir={tmp_path}/runs")
    waiting = start(tmp_path, "waiting", *recipe, f"results_dir={tmp_path}/runs", "wait=true")
    assert refused.wait() == 2
    assert "is being run by another process; type wait=true to wait for it and take its row" in refused.output
    os.kill(first.pid, signal.SIGCONT)
    os.kill(first.pid, number)
    assert first.wait() == 75, first.output
    assert re.search(rf"stopped by {number.name} after step \d+ of 400, with everything saved", first.output)
    assert waiting.wait() == 0, waiting.output
    whole = tmp_path / "whole"
    expected = config_of(*recipe, f"results_dir={whole}/runs")
    assert run(expected, whole) == 0
    assert files_of(config) == files_of(expected)
    assert len(read_rows(tmp_path / "runs")[0]) == 1


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that carry out ranks."""
    found = []
    for name in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{name}/cmdline").read_bytes()
        if b"spawn_main" in command:
            found.append(int(name))
    return found


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not LONG, reason="make faults: each run starts three processes that import torch")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found below /proc")
@pytest.mark.parametrize("victim", ["rank", "parent"])
def test_a_job_whose_process_dies_ends_and_resumes(victim: str, tmp_path: Path, figure: Callable[[str], None]) -> None:
    recipe = (*small("espcn", *SLOW), "trainer.ranks=2")
    whole = Typed(tmp_path, "whole", *recipe, f"results_dir={tmp_path}/whole")
    assert whole.wait() == 0, whole.output
    config = config_of(*recipe, f"results_dir={tmp_path}/runs")
    folder = identity.run_folder(OmegaConf.create(config))
    job = Typed(tmp_path, "job", *recipe, f"results_dir={tmp_path}/runs")
    until(lambda: saved(folder))
    ranks = until(lambda: len(found := children(job.pid)) == 2 and found)
    os.kill(ranks[1] if victim == "rank" else job.pid, signal.SIGKILL)
    killed = time.monotonic()
    code = job.wait(60)
    until(lambda: not any(map(alive, ranks)), 60)
    seconds = time.monotonic() - killed
    assert seconds < 60
    if victim == "rank":
        assert code == 1
        assert "error: a rank died, and the others were stopped" in job.output
        assert "Traceback" not in job.output
    figure(f"2 ranks, SIGKILL to the {victim}: all processes ended after {seconds:.1f} s (bound: 60 s)")
    again = Typed(tmp_path, "again", *recipe, f"results_dir={tmp_path}/runs")
    assert again.wait() == 0, again.output
    assert files_of(config) == files_of(config_of(*recipe, f"results_dir={tmp_path}/whole"))


@pytest.mark.skipif(not LONG, reason="make faults: some twenty runs")
def test_two_ranks_equal_one(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """Masks and decimal bits exactly; the score as closely as one process agrees with itself in another order of sums.

    The order: the samples of each batch are permuted, which changes nothing but the order in which floats are added.
    """
    differences, spreads = [], []
    for seed in range(3):
        recipe = (*small("espcn", f"seed={seed}"), "prune.window=8", "trainer.warm_start=false")
        scores, states = {}, {}
        for order in ("ranks", 0, 1, 2, 3, 4):
            ranks = 2 if order == "ranks" else 1
            place = tmp_path / f"{seed}-{order}"
            config = config_of(*recipe, f"trainer.ranks={ranks}", f"results_dir={place}/runs")
            if order == "ranks":
                job = Typed(place, "job", *recipe, "trainer.ranks=2", f"results_dir={place}/runs")
                assert job.wait() == 0, job.output
            else:
                assert run(config, place, order=int(order)) == 0, (place / "output.txt").read_text()
            [row], _ = read_rows(place)
            scores[order] = row.score
            network = load_file(identity.run_folder(OmegaConf.create(config)) / "network.safetensors")
            states[order] = {k: v for k, v in network.items() if k.endswith((".mask", ".decimal"))}
        assert {name.rpartition(".")[2] for name in states["ranks"]} == {"mask", "decimal"}
        assert states["ranks"].keys() == states[0].keys()
        for name, value in states["ranks"].items():
            assert value.equal(states[0][name]), name
        alone = [scores[order] for order in range(5)]
        differences.append(abs(scores["ranks"] - scores[0]))
        spreads.append(max(alone) - min(alone))
    figure(
        f"2 ranks against 1, {len(spreads)} seeds: masks and decimal bits equal; PSNR differs by at most "
        f"{max(differences):.2g} dB, and by {max(spreads):.2g} dB between orders of the samples in one process"
    )
    assert max(differences) <= max(*spreads, 1e-4)


def begun(job: Typed) -> bool:
    return "run folder" in job.output or job.process.poll() is not None


@pytest.mark.skipif(not LONG, reason="make faults: each kill starts a process that imports torch")
def test_typed_runs_that_are_killed_end_with_the_same_bits(tmp_path: Path, figure: Callable[[str], None]) -> None:
    recipe, killed = small("espcn", *SLOW), 0
    whole = Typed(tmp_path, "whole", *recipe, f"results_dir={tmp_path}/whole")
    assert whole.wait() == 0, whole.output
    for delay in (0.3, 1.1, 2.3, 3.7, 5.3, 0.7):
        job = Typed(tmp_path, "job", *recipe, f"results_dir={tmp_path}/runs")
        until(functools.partial(begun, job))
        time.sleep(delay)
        job.process.kill()
        killed += job.wait() == -signal.SIGKILL
    again = Typed(tmp_path, "again", *recipe, f"results_dir={tmp_path}/runs")
    assert again.wait() == 0, again.output
    configs = [config_of(*recipe, f"results_dir={tmp_path}/{name}") for name in ("runs", "whole")]
    assert files_of(configs[0]) == files_of(configs[1])
    figure(f"espcn by the command line: {killed} kills of one run, resumed to identical bits ({', '.join(EQUAL)})")
