"""Progress of a sweep: a line for each run that has ended, and on a terminal a bar for all of them."""

import json
import sys
import threading
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from qprune.cli.failures import STOPPED
from qprune.training.progress import duration, plain

SECONDS_BETWEEN_LOOKS = 0.5


class SweepProgress(AbstractContextManager["SweepProgress"]):
    """Prints the notes that the jobs of a sweep leave in `folder`, as they come."""

    def __init__(self, folder: Path, jobs: Sequence[Sequence[str]]) -> None:
        """Watch `folder`. jobs: the overrides of each."""
        self.folder, self.total, self.seen = folder, len(jobs), set[str]()
        self.common = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()  # of no use in a line
        self.console = Console(file=sys.stdout, soft_wrap=True, highlight=False)  # jobs redirect theirs
        columns = TextColumn("sweep"), BarColumn(24), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn()
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        self.bar.add_task("sweep", total=self.total)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self.bar.stop()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            # An output that is full or closed, of which rich makes SystemExit: the sweep says so at its end
            with suppress(OSError, SystemExit):
                self._look()

    def _look(self) -> None:
        """Print the notes that are new."""
        for path in sorted(self.folder.glob("job-*.json"), key=lambda path: (len(path.name), path.name)):
            if path.name not in self.seen:
                with suppress(OSError, ValueError):
                    note = json.loads(path.read_bytes())
                    self.seen.add(path.name)
                    if self.total > 1 or note["exit_code"] in (0, STOPPED):  # the sweep names failures at its end
                        self.console.print(plain(f"{len(self.seen)} of {self.total}  {line_of(note, self.common)}"))
        self.bar.update(self.bar.task_ids[0], completed=len(self.seen))


def line_of(note: dict[str, Any], common: Collection[str]) -> str:
    """Say in a line how a job ended: its overrides but the common ones, and its result or what went wrong."""
    how = "finished before" if note.get("before") else f"trained in {duration(note.get('seconds', 0.0))}"
    end = f"{note['result']}  {how}" if not note["exit_code"] else f"not finished: {note['message']}"
    return f"{' '.join(text for text in note['overrides'] if text not in common)}  {end}"
