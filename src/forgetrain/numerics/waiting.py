"""How threads wait for each other. Imports nothing, for it must be decided before torch is first imported.

By default an OpenMP thread that waits keeps its core busy. Several processes then take each other's cores for waiting:
with twice as many threads as cores a step took four to ten times as long as with threads that sleep, and collecting
240 s instead of 38 s. Bits do not depend on it.
"""

from __future__ import annotations

import os

#: For the environment of a process that will import torch.
SLEEP_WHILE_WAITING = {"OMP_WAIT_POLICY": "passive"}


def sleep_while_waiting() -> None:
    """For this process, unless its user decided otherwise. Without effect once torch was imported."""
    for name, value in SLEEP_WHILE_WAITING.items():
        os.environ.setdefault(name, value)
