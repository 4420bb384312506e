"""A process that has imported what engines need, and forks for each of them: importing torch takes a second or two of
a core, a reference as long as all of its work on a small model. Both ends of it are here.

``ForkServer.start`` asks for a child, ``children`` is what ``serve.py`` runs to answer. For engines that this program
vouches for, on a CPU: a stranger's gets a process that nobody used before, and a process that has looked for a GPU
cannot be forked.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

_LONGEST = 1 << 16  # bytes of a request or an answer


class Child:
    """A forked process, as far as ``subprocess.Popen`` of it: ``pid``, ``stdout``, ``stderr``, ``returncode``, and
    ``wait()``, before which nobody else gets its number."""

    def __init__(self, server: ForkServer, pid: int, stdout: IO[bytes], stderr: IO[bytes]):
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._server = server

    def exit_status(self) -> int | None:
        """As ``returncode`` will be; None while it runs. It is not reaped."""
        return self._server.ask({"do": "look", "pid": self.pid}, lost=-signal.SIGKILL)

    def wait(self) -> int:
        code = self.returncode
        if code is None:
            code = self.returncode = int(self._server.ask({"do": "wait", "pid": self.pid}, lost=-signal.SIGKILL))
            self._server.count(-1)
        return code


class ForkServer:
    """Starts at once, while this process goes on, and ends with it. ``argv``: its command line but for the number of
    its socket, which comes last."""

    def __init__(self, argv: list[str], environment: Mapping[str, str]):
        self.running = 0  # children that nobody has waited for
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        with theirs, ThreadPoolExecutor(1) as uninterrupted:  # Ctrl-C is raised in the main thread, and would leave
            uninterrupted.submit(self._start, argv, theirs.fileno(), environment).result()  # a process nobody knows

    def _start(self, argv: list[str], number: int, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [*argv, str(number)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[number],
            start_new_session=True,
            env=environment,
        )
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self._socket.fileno() >= 0 and self._process.poll() is None

    def close(self) -> None:
        """Ends the server, and its children with it."""
        with self._lock:
            self._socket.close()
            self._process.kill()
            self._process.wait()
        atexit.unregister(self.close)

    def start(self, module: str, channels: list[int], limits: Mapping[str, int]) -> Child:
        """A child that serves ``module`` on sockets of these numbers; the arguments are ``serve.py``'s. Raises OSError
        when there is none to be had."""
        with contextlib.ExitStack() as lent, contextlib.ExitStack() as kept:
            ends = []
            for _ in ("stdout", "stderr"):
                ours, theirs = os.pipe()
                kept.callback(os.close, ours)
                lent.callback(os.close, theirs)
                ends.append((ours, theirs))
            folder = os.open(".", os.O_PATH)
            lent.callback(os.close, folder)
            files = [*(theirs for _, theirs in ends), folder, *channels]
            pid = self.ask({"do": "fork", "module": module, "limits": dict(limits)}, files=files)
            kept.pop_all()
        self.count(1)
        return Child(self, pid, *(os.fdopen(ours, "rb", 0) for ours, _ in ends))

    def count(self, change: int) -> None:
        with self._lock:
            self.running += change

    def ask(self, request: Mapping[str, Any], files: list[int] | None = None, lost: int | None = None) -> Any:
        """``lost``: the answer when the server has died, for which else there is an OSError."""
        with self._lock:
            answer = b""
            try:
                socket.send_fds(self._socket, [json.dumps(request).encode()], files or [])
                answer = self._socket.recv(_LONGEST)
            except OSError:
                pass
            finally:
                if not answer:  # the server has died, or who asked was interrupted: the next answer would be to this
                    self._socket.close()
        if answer:
            return json.loads(answer)
        if lost is None:
            raise OSError("the fork server has died")
        return lost


def children(control: socket.socket, module: str) -> tuple[str, list[int], dict[str, int]] | None:
    """Imports ``module``, unless that is empty, and what its ``preload`` does; then answers requests until the other
    end is closed, and returns None; but in every child that it forks it returns what that is to serve: module,
    channels, limits."""
    if module:
        with contextlib.suppress(Exception):  # the child will fail by it, and say so
            getattr(importlib.import_module(module), "preload", lambda: None)()
    while True:
        text, files, _, _ = socket.recv_fds(control, _LONGEST, 64)
        if not text:
            return None
        request = json.loads(text)
        if request["do"] == "fork":
            pid = os.fork()
            if pid == 0:
                control.close()
                return _begin(request, files)
            for number in files:
                os.close(number)
            answer: int | None = pid
        else:
            options = os.WEXITED | (os.WNOHANG | os.WNOWAIT if request["do"] == "look" else 0)
            done = os.waitid(os.P_PID, request["pid"], options)
            answer = exit_code(done)
        control.sendall(json.dumps(answer).encode())


def _begin(request: Mapping[str, Any], files: list[int]) -> tuple[str, list[int], dict[str, int]]:
    """In the child, which gets its own session, folder and places to print to."""
    out, err, folder, *channels = files
    os.setsid()
    os.fchdir(folder)
    for end, number in ((out, 1), (err, 2)):
        os.dup2(end, number)
    for number in (out, err, folder):
        os.close(number)
    return request["module"], channels, request["limits"]


def exit_code(done: Any) -> int | None:
    """Of what ``os.waitid`` returns, as ``Popen.returncode``."""
    if done is None:
        return None
    return done.si_status if done.si_code == os.CLD_EXITED else -done.si_status
