"""A temporary folder that is removed at the end, or, after a kill, by the next one of its kind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = ".lock"


class Scratch:
    """``path``: a new folder in the system's temporary folder, named after ``kind``. Its lock, which ends with this
    process however that ends, says that it is in use."""

    def __init__(self, kind: str):
        prefix = f"forgetrain-{kind}-"
        _remove_abandoned(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = (self.path / _LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def keep_newest(folder: Path, count: int) -> None:
    """Removes the folders in ``folder``, which need not exist, but for so many that were last changed."""
    for old in sorted(folder.glob("*"), key=os.path.getmtime, reverse=True)[count:]:
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if folder.is_symlink():
            continue
        try:
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # in use, another user's, or gone
