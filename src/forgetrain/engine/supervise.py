"""The processes of an engine's ranks, in their parent's namespaces and under its limits. For ``serve.py``, beside which
it lies in a sandbox too."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping

PR_SET_PDEATHSIG = 1


def set_limits(limits: Mapping[str, int]) -> None:
    """Resource limits by their names in ``resource``, without the RLIMIT_ prefix; a core is never dumped."""
    for name, value in {"CORE": 0, **limits}.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def die_with_parent() -> None:
    """On Linux, asks the kernel to kill this process when its parent dies, whatever the engine is doing then."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def in_ranks(serve: Callable[[int, int, str], int], channels: list[int]) -> int:
    """Calls ``serve(rank, channel, store)``, with one channel here, with several in one process each: forks, so that
    what was imported until here is not imported once a rank. The first that fails ends them all.

    ``channels``: sockets' numbers. ``store``: a folder in which ranks find each other. Returns the exit code, in every
    one of the processes."""
    if len(channels) == 1:
        return serve(0, channels[0], "")
    store = tempfile.mkdtemp()
    ranks = []
    for rank, number in enumerate(channels):
        process = os.fork()
        if process == 0:
            die_with_parent()
            for other in channels[rank + 1 :]:
                os.close(other)
            return serve(rank, number, store)
        ranks.append(process)
        os.close(number)  # so that a rank's death is the end of its channel
    code = 0
    for _ in channels:
        process, status = os.wait()
        ranks.remove(process)
        code = code or os.waitstatus_to_exitcode(status)
        if code:
            for left in ranks:
                os.kill(left, signal.SIGKILL)
    shutil.rmtree(store, ignore_errors=True)
    return 128 - code if code < 0 else code
