"""Progress of training: a live line on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from qprune.errors import visible

SECONDS_BETWEEN_LINES = 10.0


def plain(text: object) -> Text:
    """Return lines as rich prints them unchanged: it reads no markup and no emoji codes in a Text."""
    return Text("\n".join(map(visible, str(text).split("\n"))))


def print_text(text: object, stderr: bool = False) -> None:
    """Print lines, never wrapped, with control characters escaped."""
    print(plain(text), file=sys.stderr if stderr else sys.stdout)


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Reporter:
    """Shows how far training is, on a terminal with a `bar` (a context manager)."""

    def __init__(self, first_step: int, epochs: int, steps_per_epoch: int, silent: bool) -> None:
        self.console = Console(quiet=silent, soft_wrap=True, highlight=False)
        self.first_step, self.epochs, self.steps_per_epoch = first_step, epochs, steps_per_epoch
        self.steps = epochs * steps_per_epoch
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        if self.console.is_terminal and not silent:
            status = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
            columns = TextColumn("{task.fields[epoch]}"), BarColumn(min(24, self.console.width // 10)), status
            self.bar = Progress(*columns, console=self.console, transient=True, expand=True)  # cuts the status alone
            self.bar.add_task("", total=self.steps, completed=first_step, epoch="")

    def due(self) -> bool:
        """Return whether a status is worth computing now: it waits for the device."""
        wait = 0.25 if self.bar else SECONDS_BETWEEN_LINES
        return time.monotonic() - self.last_line >= wait

    def show(self, step: int, status: str, permanent: bool = False) -> None:
        """Show a status; a `permanent` one (the end of an epoch) stays on the screen."""
        self.last_line = time.monotonic()
        done = step - self.first_step
        left = duration((self.last_line - self.started) / done * (self.steps - step) if done else 0.0)
        epoch, steps = f"epoch {(step - 1) // self.steps_per_epoch + 1}/{self.epochs}", f"step {step:,}/{self.steps:,}"
        if self.bar:
            task = self.bar.task_ids[0]
            self.bar.update(task, completed=step, description=f"{steps}  left {left}  {visible(status)}", epoch=epoch)
        if not self.bar or permanent:
            self.console.print(plain(f"{epoch}  {steps}  {status}  left {left}"))
