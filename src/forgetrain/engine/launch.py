"""How the processes of an engine come to be: on a CPU, forked from one that has imported what they need, where this
program vouches for the engine; else started, in a sandbox or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from forgetrain.engine import serve
from forgetrain.engine.forkserver import Child, ForkServer, exit_code
from forgetrain.numerics.determinism import CUDA_ENVIRONMENT
from forgetrain.numerics.runtime import runtime

SERVE = Path(serve.__file__)
#: -P: no folder of the script on the path; -B: no bytecode beside anybody's file; -u: last words are not lost
_SERVE = (sys.executable, "-P", "-B", "-u", str(SERVE))
#: What a stranger's engine sees of this process's environment: where programs, libraries and GPUs are.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES")

#: By process, for a fork of this one has none; by module, so that no reference runs where another was imported; by
#: origin; and by environment.
_fork_servers: dict[tuple[int, str, int, frozenset], ForkServer] = {}
_starting = threading.Lock()


class Started(subprocess.Popen):
    """A process of its own."""

    def exit_status(self) -> int | None:
        """As ``returncode`` will be; None while it runs. It is not reaped: until then nobody else gets its number."""
        return exit_code(os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))


def launch(
    module: str | Path,
    channels: list[int],
    limits: Mapping[str, int],
    device: str,
    wrap: Callable[[list[str]], list[str]] | None,
    origin: int = 0,
) -> Child | Started:
    """``serve.py`` for an engine file or a dotted module; all but ``channels``, its sockets' numbers, are
    EngineProcess's. Raises OSError when there is no process to be had."""
    flat = str(module).endswith(".py")
    engine = str(Path(module).resolve() if flat else module)
    environment = strangers_environment(device) if flat else _own_environment(device)
    if wrap is None and _can_fork(device):
        return _fork_server("" if flat else engine, origin, environment).start(engine, channels, limits)
    argv = [*_SERVE, "--engine", engine, "--channels", ",".join(map(str, channels)), "--limits", json.dumps(limits)]
    return Started(
        wrap(argv) if wrap else argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=channels,
        start_new_session=True,
        env=environment,
    )


def prepare(module: str, device: str, origin: int = 0) -> None:
    """Lets a dotted module be imported beside what this process does next, for processes that it will launch."""
    if _can_fork(device):
        _fork_server(module, origin, _own_environment(device))


def _can_fork(device: str) -> bool:
    return device == "cpu" and sys.platform == "linux"


def _fork_server(module: str, origin: int, environment: Mapping[str, str]) -> ForkServer:
    """``module``: what its children import besides torch, or empty. One for another environment ends when it has no
    children: that will hardly come back."""
    key = os.getpid(), module, origin, frozenset(environment.items())
    with _starting:
        server = _fork_servers.get(key)
        if server is None or not server.alive:
            for other, idle in list(_fork_servers.items()):
                if other[:3] == key[:3] and idle.running == 0:
                    _fork_servers.pop(other).close()
            server = _fork_servers[key] = ForkServer([*_SERVE, "--preload", module, "--forks"], environment)
    return server


def strangers_environment(device: str) -> dict[str, str]:
    """The environment of a process that runs a stranger's engine."""
    known = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return {**runtime(), **known, **_of_device(device)}


def _own_environment(device: str) -> dict[str, str]:
    """The environment of a process that runs an engine of this project's: what the user has set holds."""
    return {**runtime(), **os.environ, **_of_device(device)}


def _of_device(device: str) -> dict[str, str]:
    return CUDA_ENVIRONMENT if device == "cuda" else {}
