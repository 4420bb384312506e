"""A process between this program and a stranger's command, so that nothing of the command outlives either of them.

Run by ``watchdog.py`` as a file of its own. Its standard input is one end of a pair of sockets: that one closes when
the program at the other end is gone, however it ended, and the command is killed then. Processes that the command left
behind, in sessions of their own too, become this process's children on Linux, and are killed at the command's end.
Elsewhere its process group is. How the command ended is written to the socket as JSON: ``{"status": 0}``, negative
for a signal, or ``{"errno": 2}`` when it could not be started.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # without site-packages, which take time
    sys.path.append(str(Path(__file__).parents[3]))

from forgetrain.engine import tree
from forgetrain.engine.supervise import die_with_parent

PR_SET_CHILD_SUBREAPER = 36
_LOOK = 0.05  # seconds between looks at children
PATIENCE = 5.0  # seconds for what was killed to be gone: the kernel may hold it in a device's call


def main() -> None:
    program = socket.socket(fileno=os.dup(0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        command = subprocess.Popen(
            sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent
        )
    except OSError as error:
        answer = {"errno": error.errno}
    else:
        status = _wait(command.pid, program)
        _kill_all(command.pid)
        answer = {"status": status}
    with contextlib.suppress(OSError):
        program.sendall(json.dumps(answer).encode())


def _wait(command: int, program: socket.socket) -> int | None:
    """The command's status when it ends; None when the program at the other end is gone or has had enough."""
    while True:
        process, status = os.waitpid(-1, os.WNOHANG)  # also reaps what the command left
        if process == command:
            return os.waitstatus_to_exitcode(status)
        if not process and select.select([program], [], [], _LOOK)[0]:
            return None


def _kill_all(group: int) -> None:
    """Until no child is left, and so, on Linux, no descendant: one may fork while the others are being killed."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
        for process in tree.descendants(os.getpid())[1:]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


if __name__ == "__main__":
    main()
