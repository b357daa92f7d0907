"""Exit codes, and from an exception to one and a paragraph."""

import errno
import os
import re
import sys
import traceback
from pathlib import Path

from qprune.atomic_write import explained
from qprune.cli.signals import Stopped
from qprune.cli.streams import print_error
from qprune.errors import DEBUG_VARIABLE, Interrupted, RunFailure, UserError

USER = 2  # the input is wrong
FAILURE = 1  # a run failed, or something that was asked for could not be made
STOPPED = 75  # a signal stopped runs; the same command resumes them
INTERRUPTED, TERMINATED = 130, 143  # SIGINT or SIGTERM stopped anything else
TRAINING_VERBS = ("run", "sweep", "frontier")  # what they stop can be resumed

_NO_MEMORY = ("Cannot allocate memory", "failed to map segment")  # what a loader of libraries says
NOTHING_TYPED = (
    "qprune {verb} trains networks, for hours with a task's whole recipe; type what to train, for example: "
    "qprune {verb} {example} (all choices: qprune list; all keys: qprune run --help)"
)


def report(error: BaseException) -> tuple[int, str]:
    """Print the error on stderr and return its exit code and explanation."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    code, message = explain(error)
    print_error(message)
    return code, message


def explain(error: BaseException) -> tuple[int, str]:
    """Return exit code and a paragraph; causes of an error are looked at too."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        cause = _of_system(cause)
        for kind, code in ((UserError, USER), (RunFailure, FAILURE), (Interrupted, STOPPED)):
            if isinstance(cause, kind):
                return code, _paragraph(cause)
        if isinstance(cause, KeyboardInterrupt):
            return stopped_text(cause, TRAINING_VERBS[0])
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return FAILURE, f"out of memory ({_paragraph(cause)}); smaller batches need less: budget.batch_size=..."
        # Hydra or OmegaConf refused the config itself; by name, which needs no import
        if {"HydraException", "OmegaConfBaseException"} & {kind.__name__ for kind in type(cause).__mro__}:
            return USER, _paragraph(cause)
    if sys.platform.startswith("linux") and not Path("/proc/cpuinfo").exists():
        return FAILURE, f"{_paragraph(error)}; torch reads /proc, which is not mounted here"
    return FAILURE, (
        f"{type(error).__name__}: {_paragraph(error)}. This is a bug of qprune; please report it with the traceback "
        "that the same command prints with --debug"
    )


def stopped_text(error: KeyboardInterrupt, verb: str) -> tuple[int, str]:
    """Return exit code and what to say of a signal that stopped a verb outside of training."""
    name = str(error) or "SIGINT (Ctrl-C)"
    if verb in TRAINING_VERBS:
        code = STOPPED if isinstance(error, Stopped) else INTERRUPTED
        return (
            code,
            f"stopped by {name}; the same command resumes from the last checkpoint, or begins again without one",
        )
    return TERMINATED if name == "SIGTERM" else INTERRUPTED, f"stopped by {name}; qprune {verb} did not finish"


def output_lost(error: OSError, verb: str) -> int:
    """Say that standard output takes no more, and return the exit code."""
    trains = verb in TRAINING_VERBS and "qprune.runs.execute" in sys.modules
    if isinstance(error, BrokenPipeError) and not trains:
        return 0  # its reader has left, as `head` does
    again = "; the same command resumes from the last checkpoint" if trains else ""
    print_error(f"standard output cannot be written ({error.strerror}){again}")
    return FAILURE


def _of_system(error: BaseException) -> BaseException:
    """Return the error to show for one of the system; another one as it is."""
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of os.getcwd
        return UserError("the working folder was deleted; change to another one, and start the same command there")
    if isinstance(error, ImportError) and any(text in str(error) for text in _NO_MEMORY):
        return RunFailure(f"too little memory to load a library ({_paragraph(error)}); free some, or raise its limit")
    if isinstance(error, OSError) and error.errno in errno.errorcode and not isinstance(error, ConnectionError):
        # every file that a run writes is below results_dir, so that is where one without a name belongs
        return explained(error, Path(os.fsdecode(error.filename or "the results folder")))
    if "No space left on device" in str(error) and not isinstance(error, RunFailure):
        # libraries that write through native code lose the error number
        return explained(OSError(errno.ENOSPC, "no space"), Path("the results folder"))
    return error


def _paragraph(error: BaseException) -> str:
    return re.sub(r"\s*\n\s*", " ", str(error).strip()) or type(error).__name__
