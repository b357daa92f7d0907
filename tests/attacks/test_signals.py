"""A sweep that is told to stop stops within a step, says so, and ends, started again, as if it never had."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.attacks.conftest import TRIALS, Attacks, LostRowError, SilentDifferenceError, verb
from tests.attacks.toys import STEPS, files_of, toy
from tests.training.toy import Toy

__all__ = ["toy"]
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LONG = TRIALS >= 50
CALL = "a call"  # of any function of Python


class Moment:
    """Sends a signal to this process when it comes to a place for the `count`-th time (from 1)."""

    def __init__(self, place: str = "", count: int = 0, number: int = signal.SIGTERM, times: int = 1) -> None:
        self.place, self.count, self.number, self.times = place, count, number, times
        self.counts, self.sent, self.steps_after = Counter[str](), False, 0

    def reach(self, name: str) -> None:
        self.counts[name] += 1
        self.steps_after += self.sent and name == "before an optimizer's step"
        if (self.place, self.count) == (name, self.counts[name]) and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
            self.sent = True
            for _ in range(self.times):
                signal.raise_signal(self.number)

    def verb(self, *arguments: str) -> Any:
        """Carry out a command that passes through the places."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "replace", "unlink", "mkdir", "scandir"):
                patch.setattr(os, name, self._around(getattr(os, name), f"os.{name}"))
            patch.setattr(shutil, "rmtree", self._around(shutil.rmtree, "rmtree"))
            patch.setattr(Toy, "evaluate", self._around(Toy.evaluate, "an evaluation"))
            hooks = [
                torch.nn.modules.module.register_module_forward_hook(lambda *_: self.reach("a layer")),
                register_optimizer_step_pre_hook(lambda *_: self.reach("before an optimizer's step")),
                register_optimizer_step_post_hook(lambda *_: self.reach("after an optimizer's step")),
            ]
            try:
                if LONG and self.place in ("", CALL):
                    sys.setprofile(lambda frame, event, _: self.reach(CALL) if event == "call" else None)
                return verb(*arguments)
            finally:
                sys.setprofile(None)
                self.count = 0  # whoever keeps a function from inside sends no signal later
                for hook in hooks:
                    hook.remove()

    def _around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def reaching(*arguments: Any, **options: Any) -> Any:
            self.reach(f"before {name}")
            result = function(*arguments, **options)
            self.reach(f"behind {name}")
            return result

        return reaching


def table_of(results: Path) -> bytes:
    [path] = (results / "sweeps").glob("*.csv")
    return path.read_bytes()


@pytest.fixture(scope="module")
def whole(toy: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """The results of a sweep of three runs that was never stopped, and how often it came to each place."""
    results, moment = tmp_path_factory.mktemp("whole"), Moment()
    assert moment.verb("sweep", *toy, "seed=range(3)", f"results_dir={results}").code == 0
    assert len(files_of(results)) == 15
    return results, dict(moment.counts)


def require_whole(results: Path, whole: Path) -> None:
    """Raise unless all rows are there, with the bytes of a sweep that was never stopped, and nothing beside them."""
    found, expected = files_of(results), files_of(whole)
    if found.keys() != expected.keys():
        raise LostRowError(f"{sorted(expected.keys() ^ found.keys())}")
    differing = [name for name in found if found[name] != expected[name]]
    if differing or table_of(results) != table_of(whole):
        raise SilentDifferenceError(f"{differing or 'the table'} differ")
    assert not [*results.rglob("*.tmp"), *results.rglob("checkpoints")]


@pytest.mark.parametrize("kind", ["place", CALL] if LONG else ["place"])
def test_a_sweep_stops_within_a_step_and_ends_as_if_it_never_had(
    kind: str, toy: tuple[str, ...], whole: Any, tmp_path: Path, attacks: Attacks
) -> None:
    """The moments: before and behind what is computed, written and removed, and any call of a function."""
    expected, counts = whole
    places = sorted(counts.keys() - {CALL})

    def trial(chance: Random) -> None:
        place, number = CALL if kind == CALL else chance.choice(places), chance.choice(SIGNALS)
        moment = Moment(place, chance.randint(1, int(counts[place] * (0.95 if kind == CALL else 1))), number)
        results = tmp_path / str(chance.random())
        command = ("sweep", *toy, "seed=range(3)", f"results_dir={results}")
        answer = moment.verb(*command)
        said = answer.out + answer.err
        if moment.sent and answer.code != 75:
            raise SilentDifferenceError(f"{place} {moment.count}: exit code {answer.code} for a sweep told to stop")
        assert moment.sent or answer.code == 0
        assert not moment.sent or f"stopped by {number.name}" in said, said
        assert moment.steps_after <= 1, f"{place} {moment.count}: {moment.steps_after} steps behind the signal"
        assert verb(*command).code == 0
        require_whole(results, expected)
        shutil.rmtree(results)

    attacks.run(f"told to stop at a {kind.removeprefix('a ')} of a sweep of 3 runs", trial, TRIALS // 2 if LONG else 1)


def test_a_signal_that_comes_twice(toy: tuple[str, ...], whole: Any, tmp_path: Path, attacks: Attacks) -> None:
    """SIGTERM is answered once, as `timeout` sends it; a second Ctrl-C does not wait for the end of the step."""
    expected, _ = whole

    def trial(chance: Random) -> None:
        number = chance.choice(SIGNALS)
        moment = Moment("before an optimizer's step", chance.randint(1, 3 * STEPS), number, times=2)
        results = tmp_path / str(chance.random())
        command = ("sweep", *toy, "seed=range(3)", f"results_dir={results}")
        answer = moment.verb(*command)
        assert moment.sent
        assert answer.code == (75 if number == signal.SIGTERM else 130), answer
        assert f"stopped by {number.name}" in answer.out + answer.err
        assert verb(*command).code == 0
        require_whole(results, expected)

    attacks.run("told to stop twice in a step", trial, max(TRIALS // 5, 1))


def test_a_search_starts_nothing_more(toy: tuple[str, ...], tmp_path: Path, attacks: Attacks) -> None:
    def trial(chance: Random) -> None:
        moment = Moment("before an evaluation", 8, chance.choice(SIGNALS))  # that of the last epoch
        results = tmp_path / str(chance.random())
        words = ("order=prune_first", "bits=4,8", "sparsity=0.5", "max_loss=50%", f"results_dir={results}")
        answer = moment.verb("frontier", *toy, *words)
        assert (moment.sent, answer.code, moment.steps_after) == (True, 75, 0)
        assert "after step 24 of 24, with everything saved; the same command goes on from there" in answer.err
        assert len([*results.glob("toy/*/config.yaml")]) == 1

    attacks.run("a signal in the last evaluation of a run of a search", trial, max(TRIALS // 5, 1))


def handles_signals(process: subprocess.Popen[str]) -> bool:
    """Whether a process has a handler for SIGTERM (or has ended)."""
    if process.poll() is not None:
        return True
    status = Path(f"/proc/{process.pid}/status").read_text()
    [mask] = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="handlers are seen below /proc")
@pytest.mark.parametrize("launcher", ["basic", "joblib"] if LONG else ["basic"])
def test_processes_that_are_stopped_at_any_time(
    launcher: str, toy: tuple[str, ...], whole: Any, tmp_path: Path, attacks: Attacks
) -> None:
    """From the moment that signals are handled on: while torch is loaded, trains, and other processes train."""
    expected, _ = whole
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    extra = () if launcher == "basic" else ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

    def trial(chance: Random) -> None:
        results = tmp_path / str(chance.random())
        words = ("sweep", *toy, "seed=range(3)", f"results_dir={results}", *extra)
        command = [sys.executable, "-m", "qprune.cli.main", *words]
        number, group = chance.choice(SIGNALS), launcher == "joblib" and chance.random() < 0.5
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, **pipes, start_new_session=True)
        while not handles_signals(process):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 6 if launcher == "basic" else 12))
        (os.killpg if group else os.kill)(process.pid, number)
        said, _ = process.communicate(timeout=200)
        done = "3 runs: 3 finished, 0 failed" in said
        assert process.returncode == 75 or (done and process.returncode in (0, -number)), (process.returncode, said)
        assert "Traceback" not in said
        assert done or f"stopped by {number.name}" in said, said
        assert verb(*words[: len(words) - len(extra)]).code == 0
        require_whole(results, expected)

    attacks.run(f"a process told to stop at any time, launcher {launcher}", trial, max(TRIALS // 10, 1))
