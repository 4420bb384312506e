"""Showing a run in the terminal: a progress bar, or lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

#: Without a terminal a line is printed about this often in a whole run.
LINES = 20
#: With one, its text changes no faster than rich draws it, seconds.
REDRAWN = 0.1


def say(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: no wrapping where there is no terminal, no markup."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


class Display:
    """``with Display(console, steps, done) as display: display.show(step, lambda: "loss 3.21")``"""

    def __init__(self, console: Console, steps: int, done: int):
        self.console, self.steps = console, steps
        self._bar: Progress | None = None
        self._last, self._drawn = done, 0.0
        if console.is_terminal:
            columns = (
                *(TextColumn("train"), BarColumn(bar_width=20), MofNCompleteColumn()),
                *(
                    TextColumn("{task.description}", markup=False),
                    TimeElapsedColumn(),
                    TextColumn("ETA"),
                    TimeRemainingColumn(),
                ),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, text: Callable[[], str]) -> None:
        """``text`` is asked for only when it will be seen: to make it costs more than a step's journal line."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if step == self.steps or time.monotonic() - self._drawn >= REDRAWN:
                self._drawn = time.monotonic()
                self._bar.update(self._task, description=text())
        elif step == self.steps or step - self._last >= max(1, self.steps // LINES):
            self._last = step
            say(self.console, f"train {step}/{self.steps}  {text()}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        say(self.console, text)
