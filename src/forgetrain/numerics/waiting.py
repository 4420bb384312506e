"""How threads wait for each other. Imports nothing, for it must be decided before torch is first imported.

By default an OpenMP thread that waits keeps its core busy for milliseconds. Several processes then take each other's
cores for waiting, and a step takes many times as long. Threads that sleep at once lose a quarter to two fifths of their
speed on a quiet machine. So they wait busily for some microseconds, then sleep (docs/decisions/004-waiting-threads.md
has the figures). Bits do not depend on it.
"""

from __future__ import annotations

import os

#: For the environment of a process that will import torch, whose Linux builds bring GNU's OpenMP.
WAITING = {"GOMP_SPINCOUNT": "5000"}


def wait_briefly() -> None:
    """For this process, unless its user decided otherwise. Without effect once torch was imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
