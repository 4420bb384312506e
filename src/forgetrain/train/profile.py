"""``forgetrain train --profile-steps 10:12``: where the time and the memory of these steps go, op by op.

profile = Profile(parse_steps("10:12"), folder, console)
profile.before(step)                # of every step, counted from 1; the first outside the range writes the files
profile.close()
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from forgetrain.durable import no_space_named, write_text
from forgetrain.errors import UserError
from forgetrain.train.display import say

KEY = "--profile-steps"
TRACE, OPERATORS = "trace.json", "operators.txt"
#: Operators that are printed; the file has them all.
TOP = 10


def parse_steps(text: str) -> tuple[int, int]:
    """The first and the last step of ``first:last``, counted from 1. Raises UserError when it is no such range."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise UserError("is no range of steps", key=KEY, value=text, remedy="write first:last, for example 10:12")
    return first, last


def require_within(steps: tuple[int, int], taken: int, last: int) -> None:
    """Raises UserError when the run, which goes on after ``taken`` steps and ends with ``last``, does not take them."""
    if steps[0] <= taken or steps[1] > last:
        raise UserError(
            f"is outside of this run, which takes the steps {taken + 1} to {last}"
            if taken < last
            else f"is outside of this run, which has taken all of its {last} steps",
            key=KEY,
            value=f"{steps[0]}:{steps[1]}",
            remedy="name steps that it takes",
        )


class Profile:
    """Runs torch.profiler over a range of steps of this process; on a GPU over its kernels too."""

    def __init__(self, steps: tuple[int, int], folder: Path, console: Console):
        self.first, self.last = steps
        self.folder, self.console = folder, console
        self._profiler: Any = None
        self._done = False

    def before(self, step: int) -> None:
        """Called before each step: starts before the first of the range, and ends before the first after it."""
        if step > self.last:
            self.close()
        elif step >= self.first and self._profiler is None and not self._done:
            self._profiler = torch.profiler.profile(profile_memory=True, acc_events=True)
            self._profiler.start()

    def close(self) -> None:
        """Writes what was recorded, if anything."""
        if self._profiler is None:
            return
        profiler, self._profiler, self._done = self._profiler, None, True
        profiler.stop()
        trace, operators = self.folder / TRACE, self.folder / OPERATORS
        with no_space_named(trace):
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
        lines = operator_table(profiler.key_averages(), on_gpu=torch.cuda.is_available())
        write_text(operators, "\n".join(lines) + "\n")
        say(self.console, f"profile of steps {self.first} to {self.last}: {operators}, {trace}")
        for line in lines[: TOP + 1]:
            say(self.console, line)


def operator_table(averages: Any, *, on_gpu: bool) -> list[str]:
    """A heading, then a line an operator, the costliest first. Times and memory are the operator's own, without those
    that it calls; memory is what it took less what it gave back, over all calls."""
    rows = []
    for event in averages:
        device_ms = event.self_device_time_total / 1e3 if on_gpu else 0.0
        memory = event.self_device_memory_usage if on_gpu else event.self_cpu_memory_usage
        rows.append((event.key, event.count, event.self_cpu_time_total / 1e3, device_ms, memory / 2**20))
    ranked = 3 if on_gpu else 2
    rows.sort(key=lambda row: -row[ranked])
    whole = sum(row[ranked] for row in rows) or 1.0
    gpu_heading = f"{'GPU ms':>11}" if on_gpu else ""
    lines = [f"{'operator':<48}{'calls':>8}{'CPU ms':>11}{gpu_heading}{'share':>8}{'MiB':>11}"]
    for name, calls, cpu_ms, device_ms, mib in rows:
        gpu = f"{device_ms:>11.3f}" if on_gpu else ""
        share = (device_ms if on_gpu else cpu_ms) / whole
        lines.append(f"{name[:47]:<48}{calls:>8}{cpu_ms:>11.3f}{gpu}{share:>8.1%}{mib:>11.2f}")
    return lines
