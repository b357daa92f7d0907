"""A system that fails in the middle of a run: clear words, the last good state, and the same row in the end."""

import builtins
import errno
import fcntl
import io
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.attacks.conftest import TRIALS, Answer, Attacks, LostRowError, SilentDifferenceError, explained, verb
from tests.attacks.toys import STEPS, carry_out, files_of, toy
from tests.faults.test_disk import mount_point, mounted
from tests.training.toy import Toy

__all__ = ["mount_point", "toy"]
LONG = TRIALS >= 50
CALLS = {  # function -> errors that it may give
    "open": "EIO EACCES ENOENT EMFILE ESTALE ENOMEM EROFS ENOSPC",
    "fsync": "EIO ENOSPC EDQUOT EROFS",
    "replace": "EIO ENOSPC EACCES EROFS ESTALE EISDIR",
    "unlink": "EIO EACCES EROFS ESTALE EBUSY EISDIR",
    "mkdir": "EIO ENOSPC EACCES EROFS ENOTDIR EMLINK",
    "scandir": "EIO EACCES EMFILE ESTALE ENOMEM",
    "stat": "EIO EACCES ESTALE ETIMEDOUT",
    "flock": "ENOLCK EIO EINTR EOPNOTSUPP EBADF",
}


class Faults:
    """Has a function of the system fail below `results` from its `count`-th call on, once or for good."""

    def __init__(self, results: Path, name: str = "", count: int = 0, error: int = 0, lasting: bool = False) -> None:
        self.results, self.name, self.count, self.error, self.lasting = str(results), name, count, error, lasting
        self.counts, self.failed = Counter[str](), False

    def carry_out(self) -> Answer:
        """Carry out a run; its warnings are no errors."""
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in ("fsync", "replace", "unlink", "mkdir", "scandir", "stat"):
                patch.setattr(os, name, self._around(getattr(os, name), name))
            opening = self._around(io.open, "open")
            patch.setattr(io, "open", opening)
            patch.setattr(builtins, "open", opening)
            patch.setattr(fcntl, "flock", self._around(fcntl.flock, "flock"))
            return carry_out(Path(self.results))

    def _around(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def failing(*arguments: Any, **options: Any) -> Any:
            if name in ("fsync", "flock") or str(arguments[0] if arguments else "").startswith(self.results):
                self.counts[name] += 1
                calls = self.counts[name]
                if name == self.name and (calls == self.count or (self.lasting and calls > self.count)):
                    self.failed = True
                    named = () if name in ("fsync", "flock") else (str(arguments[0]),)
                    raise OSError(self.error, os.strerror(self.error), *named)
            return function(*arguments, **options)

        return failing


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], dict[str, int]]:
    """The files of a run without faults, and how often it calls each function."""
    results = tmp_path_factory.mktemp("whole")
    faults = Faults(results)
    assert faults.carry_out().code == 0
    assert faults.counts.keys() == CALLS.keys()
    return files_of(results), dict(faults.counts)


def ends_whole(results: Path, expected: dict[str, bytes]) -> None:
    """Carry out the run again, and raise unless its row is as that of a run without faults."""
    again = carry_out(results)
    assert again.code == 0, again
    found = files_of(results)
    if found.keys() != expected.keys():
        raise LostRowError(f"{found.keys() ^ expected.keys()}")
    if differing := [name for name in found if found[name] != expected[name]]:
        raise SilentDifferenceError(f"{differing} differ")


@pytest.mark.parametrize("name", CALLS)
def test_a_function_of_the_system_that_fails(name: str, whole: Any, tmp_path: Path, attacks: Attacks) -> None:
    expected, counts = whole

    def trial(chance: Random) -> None:
        results = tmp_path / str(chance.random())
        count = chance.randint(1, counts[name])
        error = getattr(errno, chance.choice(CALLS[name].split()))
        faults = Faults(results, name, count, error, chance.random() < 0.5)
        answer = faults.carry_out()
        assert faults.failed
        assert answer.code in (0, 1, 2), answer
        if answer.code and os.strerror(error) not in answer.err and "no space is left" not in answer.err:
            raise SilentDifferenceError(f"{name} {count}: {os.strerror(error)} is not named: {answer.err}")
        ends_whole(results, expected)

    attacks.run(f"errors of {name} in mid-run", trial, max(TRIALS // 3, 1))


def _take_away(path: Path, chance: Random, aside: Path) -> str:
    """Remove a file or folder, move it aside, or put something else in its place; return which."""
    how = chance.choice(("removed", "moved", "file", "folder"))
    if how == "moved":
        path.rename(aside)
        return how
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if how == "file":
        path.write_text("in the way")
    elif how == "folder":
        path.mkdir()
    return how


def test_what_is_taken_away_in_mid_run(whole: Any, tmp_path: Path, attacks: Attacks) -> None:
    """The results, the task's or the run's folder, its config, its curve, its lock, its checkpoints or one of them."""
    expected, _ = whole

    def trial(chance: Random) -> None:
        results, aside = tmp_path / str(chance.random()), tmp_path / f"aside{chance.random()}"
        step, place = chance.randint(2, STEPS), chance.randint(0, 7)
        train_step, taken = Toy.train_step, list[tuple[Path, str]]()

        def acting(task: Toy, batch: Any) -> Any:
            if task.calls + 1 == step and not taken:
                [run] = results.glob("toy/*")
                names = ("config.yaml", "metrics.csv", ".lock", "plan.csv", "checkpoints")
                newest = max((run / "checkpoints").glob("*.pt"))
                path = (results, results / "toy", run, newest, *(run / name for name in names))[place]
                if path.exists():  # no curve before the first epoch
                    taken.append((path, _take_away(path, chance, aside)))
            return train_step(task, batch)

        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(Toy, "train_step", acting)
            answer = carry_out(results)
        assert answer.code in (0, 1, 2), answer
        for path, how in taken:
            if answer.code and path.name not in answer.err and str(path.parent.name) not in answer.err:
                raise SilentDifferenceError(f"{path} {how}: it is not named: {answer.err}")
            if how in ("file", "folder") and answer.code and path.exists():  # the way is cleared, as the error asks
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            # a run that ended without an old checkpoint has removed their folder
            if how == "moved" and not path.exists() and path.parent.exists():
                aside.rename(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ends_whole(results, expected)

    attacks.run("files and folders that are taken away", trial, TRIALS)


def test_results_that_are_unmounted_in_mid_run(whole: Any, mount_point: Path) -> None:
    if not (shutil.which("mount") and mounted(mount_point, "-o", "size=4m")):
        pytest.skip("file systems can only be mounted by root")
    train_step = Toy.train_step

    def acting(task: Toy, batch: Any) -> Any:
        if task.calls == 7:
            subprocess.run(["umount", "-l", str(mount_point)], check=True, capture_output=True)
        return train_step(task, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Toy, "train_step", acting)
        answer = carry_out(mount_point / "runs")
    assert answer.code == 1
    assert "is gone (No such file or directory): it was deleted, moved or unmounted; put back what was" in answer.err
    assert [*mount_point.iterdir()] == [], "something was written to the disk below"
    ends_whole(mount_point / "runs", whole[0])


def test_old_checkpoints_that_cannot_be_removed(whole: Any, tmp_path: Path) -> None:
    name = "step-999999999-0123456789abcdef.pt"  # a folder of the name of a checkpoint is none

    def acting(task: Toy, batch: Any) -> Any:
        for folder in tmp_path.glob("toy/*/checkpoints"):
            (folder / name).mkdir(exist_ok=True)
        return train_step(task, batch)

    train_step, unlink = Toy.train_step, os.unlink

    def failing(path: Any, **options: Any) -> None:
        if str(path).endswith(".pt"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        unlink(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", failing)
        patch.setattr(shutil, "rmtree", lambda path, **_: subprocess.run(["rm", "-r", str(path)], check=False))
        patch.setattr(Toy, "train_step", acting)
        with pytest.warns(UserWarning, match=r"\.pt cannot be removed \(Input/output error\); delete it by hand"):
            assert carry_out(tmp_path).code == 0
    assert files_of(tmp_path) == whole[0]


def test_a_worker_that_is_killed_names_the_runs(toy: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    mark = tmp_path / "dies"
    mark.touch()
    monkeypatch.setenv("DIES", str(mark))
    words = (*toy, "task._target_=tests.attacks.toys.Dying", "seed=range(3)", f"results_dir={tmp_path}/runs")
    command = ("sweep", *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    answer = process(*command)
    assert answer.code == 1
    assert "error: hydra/launcher=joblib lost a process, and stopped these runs: " in answer.err
    stopped = answer.err.partition("these runs: ")[2].partition("; the same command goes on")[0]
    assert sorted(re.findall(r"seed=\d", stopped)) == ["seed=0", "seed=1"]
    assert answer.out.endswith("3 runs: 0 finished, 0 failed, 2 interrupted, 1 not started\n")
    answer = verb("sweep", *words)
    assert answer.code == 0
    assert answer.out.endswith("3 runs: 3 finished, 0 failed\n")


def process(*arguments: str, before: tuple[str, ...] = ()) -> Answer:
    """Carry out a command in a process of its own."""
    command = [*before, sys.executable, "-m", "qprune.cli.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return explained(Answer(done.returncode, done.stdout, done.stderr))


@pytest.mark.skipif(not LONG, reason="make attacks: processes that load torch")
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="memory is bounded by prlimit")
def test_too_little_memory(toy: tuple[str, ...], tmp_path: Path, attacks: Attacks) -> None:
    def trial(chance: Random) -> None:
        results, limit = tmp_path / str(chance.random()), int(10 ** chance.uniform(8.3, 9.6))
        command = ("run", *toy, f"results_dir={results}")
        answer = process(*command, before=("prlimit", f"--as={limit}"))
        assert answer.code in (0, 1), (limit, answer)
        assert answer.code == 0 or "memory" in answer.err, (limit, answer)
        assert verb(*command).code == 0

    attacks.run("too little memory", trial, max(TRIALS // 10, 1))
