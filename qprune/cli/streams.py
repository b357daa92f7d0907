"""Standard streams that are closed, full or of few letters."""

import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from qprune.errors import visible


def open_streams() -> None:
    """Make standard streams usable: none closed, and none that refuses a letter."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: the next file that is opened would get all that is printed
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def flush(stream: TextIO, text: str = "") -> OSError | None:
    """Print a text. A stream that fails is pointed at /dev/null, and its error returned: else Python exits with 120."""
    try:
        print(text, end="", file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None


def print_error(message: str) -> None:
    """Print an error on stderr, if that can be written."""
    with suppress(OSError):
        print(f"error: {visible(message)}", file=sys.stderr)
