"""How far a build of data is: a bar with its ETA in a terminal, a line now and then where there is none."""

from __future__ import annotations

import datetime
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

#: Without a terminal a line comes when so many seconds have passed and a tenth of the work was done.
LINE_SECONDS = 10.0


class Display:
    """``with Display(console) as display: build_data(target, out, report=display.show)``"""

    def __init__(self, console: Console):
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what = ""
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, TextColumn("{task.fields[eta]}"), console=console, transient=True)

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("data", total=None, eta="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """``what`` is done now, of which ``done`` of ``total`` bytes are; a total of 0 is not known."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._begun, self._line_at = what, now, done, now + LINE_SECONDS
            self._line_done = done
        if self._bar is not None:
            eta = self._eta(now, done, total)
            self._bar.update(
                self._task, description=what, completed=done, total=total or None, eta=f"ETA {eta}" if eta else ""
            )
        elif now >= self._line_at and (done - self._line_done) * 10 >= total:
            self._line_at, self._line_done = now + LINE_SECONDS, done
            far = f"{100 * done / total:.0f}%, ETA {self._eta(now, done, total)}" if total else "running"
            self._console.print(f"{what}: {far}", highlight=False, markup=False, soft_wrap=True)

    def _eta(self, now: float, done: int, total: int) -> str:
        """At the mean speed since this work began here: what an earlier build did is no work of this one."""
        if total == 0 or done <= self._begun:
            return ""
        seconds = (now - self._began) * (total - done) / (done - self._begun)
        return str(datetime.timedelta(seconds=round(seconds)))
