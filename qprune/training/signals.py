"""Signals that ask a run to stop: noted, so that the step ends and everything is saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol


class Stoppable(Protocol):
    """What looks at `stop_signal` after each step."""

    stop_signal: int | None


@contextmanager
def catching(stoppable: Stoppable) -> Iterator[None]:
    """SIGTERM and SIGINT let the step finish; a second SIGINT stops at once. Outside the main thread: as they are."""

    def note(number: int, frame: FrameType | None) -> None:
        if stoppable.stop_signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        stoppable.stop_signal = number

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
