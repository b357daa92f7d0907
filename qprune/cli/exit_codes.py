"""From an exception to one paragraph and an exit code."""

import errno
import os
import sys
import traceback
from pathlib import Path

from qprune.atomic_write import explained
from qprune.errors import DEBUG_VARIABLE, Interrupted, RunFailure, UserError

USER, FAILURE, STOPPED, INTERRUPTED, TERMINATED = 2, 1, 75, 130, 143  # exit codes
TRAINING_VERBS = ("run", "sweep", "frontier")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class Terminated(KeyboardInterrupt):
    """SIGTERM outside of training, which saves its state by itself."""


def stopped_text(error: KeyboardInterrupt, verb: str) -> tuple[int, str]:
    """Return exit code and what to say of a signal that stopped a verb outside of training."""
    code, name = (TERMINATED, "SIGTERM") if isinstance(error, Terminated) else (INTERRUPTED, "SIGINT (Ctrl-C)")
    if verb in TRAINING_VERBS:
        return (
            code,
            f"stopped by {name}; the same command resumes from the last checkpoint, or begins again without one",
        )
    return code, f"stopped by {name}; qprune {verb} did not finish"


def report(error: BaseException) -> tuple[int, str]:
    """Print the error on stderr and return its exit code and explanation."""
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    code, message = explain(error)
    print(f"error: {message}", file=sys.stderr)
    return code, message


def explain(error: BaseException) -> tuple[int, str]:
    """Return exit code and a paragraph; causes of an error are looked at too."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in _DISK:
            # every file that a run writes is below results_dir, so that is where one without a name belongs
            cause = explained(cause, Path(cause.filename or "the results folder"))
        elif "No space left on device" in str(cause) and not isinstance(cause, RunFailure):
            # libraries that write through native code lose the error number
            cause = explained(OSError(errno.ENOSPC, "no space"), Path("the results folder"))
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
    return FAILURE, (
        f"{type(error).__name__}: {_paragraph(error)}. This is a bug of qprune; please report it with the traceback "
        "that the same command prints with --debug"
    )


def _paragraph(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
