"""Outputs that are closed, full or gone, and other surroundings: clear words, the right exit code, and whole rows."""

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qprune.cli import main as cli
from tests.attacks.conftest import TRIALS, Answer, Attacks, LostRowError, SilentDifferenceError, explained, verb
from tests.attacks.toys import files_of, toy, toy_words

__all__ = ["toy"]
LONG = TRIALS >= 50
QPRUNE = (sys.executable, "-m", "qprune.cli.main")
PRINTING = (
    *(("--help",), ("--version",), ("list",), ("list", "tasks"), ("completion", "bash"), ("run", "--help")),
    *(("plan", "task=espcn", "data=synthetic", "budget=smoke"), ("run", "task=espcn", "--cfg", "job")),
    ("nonsense",),
)
FULL = "error: standard output cannot be written (No space left on device)"


class Device(io.RawIOBase):
    """A stream that fails with an error of the system behind so many bytes."""

    def __init__(self, error: int, behind: int) -> None:
        self.error, self.left = error, behind
        self.handle = os.open(os.devnull, os.O_WRONLY)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.handle

    def write(self, data: Any) -> int:
        self.left -= len(data)
        if self.left < 0 and self.error:
            raise OSError(self.error, os.strerror(self.error))
        return len(data)


def answer_into(device: Device, *arguments: str) -> Answer:
    """Carry out a command in this process whose standard output is a device."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        # a device without a descriptor of its own: what is pointed at /dev/null is one that nothing else has
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(device, 64), "utf-8", line_buffering=True))
        patch.setattr(sys, "stderr", said)
        code = cli.main(arguments)
        device.error = 0  # what is left in the buffer goes the way of the stream
        sys.stdout.flush()
    os.close(device.handle)
    return explained(Answer(code, "", said.getvalue()))


def rows_of(results: Path) -> dict[str, bytes]:
    """The files of finished runs but their configs, in which a sweep notes what its runs share."""
    return {name: content for name, content in files_of(results).items() if not name.endswith("config.yaml")}


@pytest.fixture(scope="module")
def whole(toy: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of two runs."""
    results = tmp_path_factory.mktemp("whole")
    assert verb("sweep", *toy, "seed=0,1", f"results_dir={results}").code == 0
    return rows_of(results)


def test_output_that_fails_behind_some_bytes(
    toy: tuple[str, ...], whole: dict[str, bytes], tmp_path: Path, attacks: Attacks
) -> None:
    """A disk that is full, a terminal that is gone, a reader that has left: of runs, sweeps, and what only prints."""

    def trial(chance: Random) -> None:
        results = tmp_path / str(chance.random())
        error = chance.choice((errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EDQUOT, errno.EBADF))
        trains = chance.random() < 0.5
        run = (chance.choice(("run", "sweep")) if LONG else "run", *toy, f"results_dir={results}")
        words = (*run, "seed=0,1" if run[0] == "sweep" else "seed=0") if trains else chance.choice(PRINTING[:-1])
        device = Device(error, chance.choice((0, 0, chance.randint(0, 2000))))
        with pytest.MonkeyPatch.context() as patch:
            if not trains:  # a process of its own would not have imported what trains
                patch.delitem(sys.modules, "qprune.runs.execute", raising=False)
            answer = answer_into(device, *words)
        if device.left >= 0:
            assert answer.code == 0, answer
        elif error != errno.EPIPE:
            if answer.code != 1:
                raise SilentDifferenceError(f"{words}: {answer}")
            assert f"standard output cannot be written ({os.strerror(error)})" in answer.err, answer
            assert "results" not in answer.err
        elif not trains:
            assert answer == Answer(0, "", ""), "as with head"
        if trains:
            assert verb(*words).code == 0
            if rows_of(results).items() - whole.items():
                raise SilentDifferenceError(f"{words}: other rows")
            assert len(rows_of(results)) == (8 if run[0] == "sweep" else 4)

    attacks.run("standard output that fails", trial, TRIALS)


def shell(line: str, *arguments: str, **options: Any) -> Answer:
    """Carry out a line of a shell, in which "$@" is qprune with these arguments."""
    done = subprocess.run(
        ["sh", "-c", line, "sh", *QPRUNE, *arguments], capture_output=True, timeout=300, check=False, **options
    )
    out, err = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))  # of any encoding
    return explained(Answer(done.returncode, out, err))


def test_streams_that_a_shell_closes_or_fills(
    toy: tuple[str, ...], whole: dict[str, bytes], tmp_path: Path, attacks: Attacks
) -> None:
    def trial(chance: Random) -> None:
        out, err = (
            chance.choice((("", ""), (">&-", ""), (">/dev/full", ""))),
            chance.choice(("", "2>&-", "2>/dev/full")),
        )
        line = f'"$@" {out[0]} {err} {chance.choice(("", "<&-"))}'
        results = tmp_path / str(chance.random())
        trains = LONG and chance.random() < 0.3
        words = ("run", *toy, "seed=0", f"results_dir={results}") if trains else chance.choice(PRINTING)
        done = subprocess.run(["sh", "-c", line, "sh", *QPRUNE, *words], capture_output=True, timeout=300, check=False)
        full = "full" in out[0]
        expected = (2,) if words == ("nonsense",) else (1,) if full else (0,)
        if done.returncode not in expected:
            raise SilentDifferenceError(f"{line} {words}: exit code {done.returncode}: {done.stderr.decode()}")
        assert b"Traceback" not in done.stdout + done.stderr
        assert b"Exception ignored" not in done.stdout + done.stderr
        if full and not err and words != ("nonsense",):
            assert done.stderr.decode().startswith(FULL), done.stderr
        if trains:
            assert verb(*words).code == 0
            if rows_of(results).items() - whole.items():
                raise SilentDifferenceError("what was printed is in a file of the run")

    attacks.run("streams that a shell closes or fills", trial, max(TRIALS // 4, 3))


@pytest.mark.parametrize(
    "words", [("list",), ("run", "task=espcn", "data=synthetic", "budget=smoke")], ids=lambda w: w[0]
)
def test_a_working_folder_that_was_deleted(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    code = cli.main(words)
    error = capsys.readouterr().err
    if words[0] == "run":
        assert code == 2
        assert error == (
            "error: the working folder was deleted; change to another one, and start the same command there\n"
        )
    else:
        assert (code, error) == (0, "")


LOCALES = ({"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "POSIX"}, {"PYTHONIOENCODING": "latin-1"})


def test_names_beyond_the_letters_of_a_locale(whole: dict[str, bytes], tmp_path: Path, attacks: Attacks) -> None:
    def trial(chance: Random) -> None:
        name = "".join(chance.sample("äßéλж漢字🙂 ", 4)).strip()
        environment = os.environ | {"PYTHONCOERCECLOCALE": "0"} | chance.choice(LOCALES)
        folder = tmp_path / f"{chance.random()}{name}"
        words = toy_words(folder / name)
        commands = [
            ("run", *words, "seed=0", f"results_dir={folder}/{name}"),
            ("list", "runs", f"results_dir={folder}"),
        ]
        for command in commands if LONG else commands[1:]:
            answer = shell('"$@"', *command, env=environment)
            # Python told to read names as ASCII refuses them in words; it does not by LC_ALL=C alone
            assert answer.code == 0 or (answer.code == 2 and "PYTHONUTF8" in environment and command[0] == "run"), (
                answer
            )
        if LONG and "PYTHONUTF8" not in environment and rows_of(folder / name).items() - whole.items():
            raise SilentDifferenceError("other rows")

    attacks.run("folders named beyond the letters of a locale", trial, max(TRIALS // 10, 2))


def unshared(*flags: str) -> bool:
    """Whether this process may give others a system of their own."""
    found = shutil.which("unshare")
    return bool(found) and subprocess.run(["unshare", *flags, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not LONG, reason="make attacks: processes that load torch")
def test_a_system_without_proc(toy: tuple[str, ...], tmp_path: Path, attacks: Attacks) -> None:
    if not unshared("-m"):
        pytest.skip("file systems can only be taken away by root")

    def trial(chance: Random) -> None:
        results = tmp_path / str(chance.random())
        launcher = chance.choice(((), ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")))
        words = ("sweep", *toy, "seed=0,1", f"results_dir={results}", *launcher)
        without = 'exec unshare -m sh -c "mount -t tmpfs none /proc && exec \\"\\$@\\"" sh "$@"'
        answer = shell(without, *words)
        assert answer.code == 0 or "/proc, which is not mounted here" in answer.err, answer
        if answer.code == 0 and len(rows_of(results)) != 8:  # torch chooses other kernels, so the bits may differ
            raise LostRowError(f"{rows_of(results).keys()}")

    attacks.run("a system without /proc", trial, 2)


@pytest.mark.skipif(not LONG, reason="make attacks: processes that load torch")
def test_two_ranks_without_a_loopback(toy: tuple[str, ...], tmp_path: Path) -> None:
    if not unshared("-n"):
        pytest.skip("a network can only be taken away by root")
    answer = shell('exec unshare -n "$@"', "run", *toy, "trainer.ranks=2", f"results_dir={tmp_path}")
    assert answer.code == 1
    assert "error: ranks cannot reach each other" in answer.err
