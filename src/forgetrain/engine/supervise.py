"""The parent of an engine's ranks: one process of serve.py each, in this process's namespaces and under its limits.

    supervise.py --engine engine.py --channels 5,6

Nothing here imports torch: the ranks, which do, would start only after it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

PR_SET_PDEATHSIG = 1


def set_limits(limits: Mapping[str, int]) -> None:
    """Resource limits by their names in ``resource``, without the RLIMIT_ prefix; a core is never dumped."""
    for name, value in {"CORE": 0, **limits}.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def die_with_parent() -> None:
    """On Linux, asks the kernel to kill this process when its parent dies, whatever the engine is doing then."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def supervise(engine: str, channels: list[int]) -> int:
    """Starts one process a rank; the first that fails ends them all."""
    with tempfile.TemporaryDirectory() as store:
        ranks = []
        for rank, number in enumerate(channels):
            command = [sys.executable, "-P", "-B", "-u", str(Path(__file__).with_name("serve.py"))]
            command += ["--engine", engine, "--channel", str(number)]
            command += ["--rank", str(rank), "--ranks", str(len(channels)), "--store", store]
            ranks.append(subprocess.Popen(command, pass_fds=[number]))
            os.close(number)  # so that a rank's death is the end of its channel
        code = 0
        for _ in ranks:
            _, status = os.wait()
            code = code or os.waitstatus_to_exitcode(status)
            if code:
                for process in ranks:
                    process.kill()
        return 128 - code if code < 0 else code


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="a path that ends in .py, or a dotted module name")
    parser.add_argument("--channels", required=True, help="inherited sockets' numbers, one a rank")
    parser.add_argument("--limits", type=json.loads, default={}, help="JSON object of resource limits")
    arguments = parser.parse_args()
    die_with_parent()
    set_limits(arguments.limits)
    return supervise(arguments.engine, [int(number) for number in arguments.channels.split(",")])


if __name__ == "__main__":
    sys.exit(main())
