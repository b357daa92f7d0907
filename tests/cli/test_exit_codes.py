"""Failures: one paragraph, an exit code, and the traceback for who asks."""

import errno
import signal
import subprocess
import sys

import pytest

from qprune.cli import failures
from qprune.cli import main as cli
from qprune.errors import RunFailure, UserError
from tests.cli.errors import fails_with

SMOKE = ("task=espcn", "data=synthetic", "budget=smoke")
FULL = (
    "no space is left on the disk to write {}; free some, or choose another folder with results_dir=..., and start the "
    "same command again: it resumes from the last checkpoint"
)
BUG = "This is a bug of qprune; please report it with the traceback that the same command prints with --debug"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("prune.sparsity=2 is wrong"), 2, "prune.sparsity=2 is wrong"),
        (RunFailure("no loss\n  at all"), 1, "no loss at all"),
        (OSError(errno.ENOSPC, "No space left on device", "/results/x"), 1, FULL.format("/results/x")),
        (
            PermissionError(errno.EACCES, "Permission denied", "/results/x"),
            2,
            "/results/x cannot be written (Permission denied); choose a folder that can, with results_dir=...",
        ),
        (
            OSError(errno.EIO, "Input/output error", "/results/x"),
            1,
            (
                "/results/x cannot be read or written (Input/output error); once it can, start the same command again: "
                "it resumes from the last checkpoint"
            ),
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/results/x"),
            1,
            (
                "/results/x is gone (No such file or directory): it was deleted, moved or unmounted; put back what was "
                "moved, and start the same command again: it resumes from the last checkpoint that is there"
            ),
        ),
        (
            ImportError("libtorch_cpu.so: failed to map segment from shared object", name="torch"),
            1,
            (
                "too little memory to load a library (libtorch_cpu.so: failed to map segment from shared object); free "
                "some, or raise its limit"
            ),
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file: No space left on device"),
            1,
            FULL.format("the results folder"),
        ),
        (MemoryError(), 1, "out of memory (MemoryError); smaller batches need less: budget.batch_size=..."),
        (ZeroDivisionError("division by zero"), 1, f"ZeroDivisionError: division by zero. {BUG}"),
    ],
)
def test_failures_are_one_paragraph_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    fails_with(error, monkeypatch)
    assert cli.main(["run", *SMOKE]) == code
    assert capsys.readouterr() == ("", f"error: {said}\n")


def test_an_error_within_another_is_found() -> None:
    outer = ValueError("Error in call to target 'tasks.Mine'")
    outer.__cause__ = UserError("task.scale=0 is no magnification")
    assert failures.explain(outer) == (2, "task.scale=0 is no magnification")


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fails_with(RunFailure("no loss"), monkeypatch)
    assert cli.main(["run", "--debug", *SMOKE]) == 1
    assert "in execute\n" in capsys.readouterr().err
    assert cli.main(["--debug", "run", "task=epscn"]) == 2
    assert capsys.readouterr().err.startswith("Traceback (most recent call last)")


def test_a_second_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fails_with(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["run", *SMOKE]) == 130
    said = "the same command resumes from the last checkpoint, or begins again without one"
    assert capsys.readouterr().err == f"error: stopped by SIGINT (Ctrl-C); {said}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("verb", "said"), [("run", "begins again without one"), ("list", "qprune list did not finish")]
)
def test_a_signal_before_training_is_no_traceback_and_no_silence(number: int, verb: str, said: str) -> None:
    """The module that the verb needs sends it, as somebody who types Ctrl-C while torch is loaded."""
    module = {"run": "qprune.runs.execute", "list": "qprune.cli.list"}[verb]
    code = (
        "import sys, signal, importlib.abc\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        f"    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal({int(number)})\n"
        "sys.meta_path.insert(0, Finder())\n"
        f"from qprune.cli.main import main; sys.exit(main([{verb!r}, *{[*SMOKE] if verb == 'run' else []}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    other = {signal.SIGINT: 130, signal.SIGTERM: 143}[signal.Signals(number)]
    assert done.returncode == (75 if verb == "run" else other)
    assert done.stderr.startswith(f"error: stopped by {signal.Signals(number).name}")
    assert done.stderr.endswith(f"{said}\n")
    assert done.stderr.count("\n") == 1
