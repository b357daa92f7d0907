"""Progress of training: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class Status:
    """The figures of one line of progress."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    phase: str
    metric: str
    score: float | None
    sparsity: dict[str, float]

    def text(self) -> str:
        """Return everything but the counts, for people."""
        score = "-" if self.score is None else f"{self.score:.3f}"
        zeros = ", ".join(f"{kind[0]} {value:.1%}" for kind, value in self.sparsity.items() if value > 0)
        zeros = f"  zeros {zeros}" if zeros else ""
        return f"loss {self.loss:.4g}  {self.metric} {score}  phase {self.phase}{zeros}"


class Reporter:
    """Shows statuses; `silent` for ranks other than 0. A context manager."""

    def __init__(self, first_step: int, steps: int, silent: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(quiet=silent, soft_wrap=True, highlight=False)
        self.first_step, self.steps = first_step, steps
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.bar_task = TaskID(0)
        if self.console.is_terminal and not silent:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar_task = self.bar.add_task("", total=steps, completed=first_step)

    def __enter__(self) -> Reporter:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def due(self) -> bool:
        """Return whether a status is worth computing now: it waits for the device."""
        wait = 0.25 if self.bar else SECONDS_BETWEEN_LINES
        return time.monotonic() - self.last_line >= wait

    def show(self, status: Status, permanent: bool = False) -> None:
        """Show a status; a `permanent` one (the end of an epoch) stays on the screen."""
        self.last_line = time.monotonic()
        if self.bar:
            self.bar.update(self.bar_task, completed=status.step, description=status.text())
            if not permanent:
                return
        done = status.step - self.first_step
        left = (self.last_line - self.started) / done * (status.steps - status.step) if done else 0.0
        self.console.print(
            f"epoch {status.epoch}/{status.epochs}  step {status.step}/{status.steps}  {status.text()}  "
            f"left {time.strftime('%H:%M:%S', time.gmtime(left))}"
        )
