"""Running a stranger's command: stdin closed, wall and silence limits, and nothing of it left running afterwards."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_TAIL = 16_000  # bytes of output that are kept


@dataclass(frozen=True)
class Outcome:
    """How the command ended: ``status`` its exit status (negative: a signal), None when a watchdog ended it."""

    status: int | None
    reason: str
    output: str
    seconds: float


def run_watched(
    command: list[str], folder: Path, *, wall: float, silence: float, environment: Mapping[str, str] | None = None
) -> Outcome:
    """Runs ``command`` in ``folder`` until it ends, ``wall`` seconds pass, or ``silence`` seconds without output.

    The whole process group is killed in every case. Raises FileNotFoundError when there is no such command.
    """
    started = last = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=None if environment is None else dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    output, reason = b"", ""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if process.poll() is not None:
                    break
                if now - started > wall:
                    reason = f"stopped after {wall:.0f} s"
                    break
                if now - last > silence:
                    reason = f"stopped after {silence:.0f} s of silence"
                    break
                if selector.select(timeout=0.2):
                    chunk = process.stdout.read(65536)
                    if chunk:
                        last, output = now, (output + chunk)[-_TAIL:]
                    else:
                        time.sleep(0.05)  # its output is closed, but it still runs
    finally:
        _kill_group(process.pid)
        process.wait()
    output = (output + (process.stdout.read() or b""))[-_TAIL:]
    process.stdout.close()
    text = output.decode("utf-8", errors="replace")
    status = None if reason else process.returncode
    return Outcome(status, reason or f"exit status {process.returncode}", text, time.monotonic() - started)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
