"""One run at a time in a run's folder: two would write the same checkpoints and metrics."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forgetrain.errors import UserError

#: When torchrun itself is killed, its ranks see it within two seconds; a supervisor may start the next run before.
WAIT_SECONDS = 15.0


@contextmanager
def only_run(folder: Path, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Holds ``folder/.train.lock``, which the system takes back when this process ends in any way.

    Raises:
        UserError: another process still holds it after ``wait_seconds``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait_seconds
    with (folder / ".train.lock").open("a") as file:
        while not _taken(file.fileno()):
            if time.monotonic() > until:
                raise UserError("another process trains in this folder", file=folder, remedy="stop it, or wait for it")
            time.sleep(0.1)
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
