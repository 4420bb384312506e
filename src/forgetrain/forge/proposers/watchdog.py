"""Running a stranger's command: stdin closed, wall and silence limits, and nothing of it left running afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from forgetrain.forge.proposers.supervisor import PATIENCE

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
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

    It is killed in every case with all that it started, also when this process is: ``supervisor.py`` sees to it.
    Raises OSError when it cannot be started, as FileNotFoundError when there is no such command.
    """
    started = time.monotonic()
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_SUPERVISOR), *command],
                cwd=folder,
                env=None if environment is None else dict(environment),
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert process.stdout is not None
        with process.stdout as stream:
            os.set_blocking(stream.fileno(), False)
            try:
                output, reason = _follow(process, stream, wall, silence)
            finally:
                with contextlib.suppress(OSError):  # it has ended already
                    ours.shutdown(socket.SHUT_WR)
                _wait(process)
            output = (output + (stream.read() or b""))[-_TAIL:]
        answer = json.loads(ours.recv(1024) or b"{}")
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]), command[0])
    status = None if reason else answer.get("status", process.returncode)
    text = output.decode("utf-8", errors="replace")
    return Outcome(status, reason or f"exit status {status}", text, time.monotonic() - started)


def _follow(process: subprocess.Popen, stream: IO[bytes], wall: float, silence: float) -> tuple[bytes, str]:
    """The end of its output until the process ends, or until it has to be ended, and why."""
    output, started = b"", time.monotonic()
    last = started
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while process.poll() is None:
            now = time.monotonic()
            if now - started > wall:
                return output, f"stopped after {wall:.0f} s"
            if now - last > silence:
                return output, f"stopped after {silence:.0f} s of silence"
            if selector.select(timeout=0.2):
                chunk = stream.read(65536)
                if chunk:
                    last, output = now, (output + chunk)[-_TAIL:]
                else:
                    time.sleep(0.05)  # its output is closed, but it still runs
    return output, ""


def _wait(process: subprocess.Popen) -> None:
    try:
        process.wait(2 * PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
