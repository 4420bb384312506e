"""A temporary folder that is removed at the end, or, after a kill, by the next one of its kind."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

_LOCK = ".lock"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


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
        remove(self.path)
        self._lock.close()


def keep_newest(folder: Path, count: int) -> None:
    """Removes the folders in ``folder``, but for so many that were last changed. Not for candidates' folders: they can
    set that time."""
    for old in sorted(folder.glob("*"), key=os.path.getmtime, reverse=True)[count:]:
        remove(old)


@contextlib.contextmanager
def folder_in(parent: Path) -> Iterator[Path]:
    """A new folder, removed at the end."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        remove(folder)


def remove(folder: Path) -> None:
    """Removes a folder, whatever a stranger, who is gone, made in it; what cannot be removed stays.

    Folders are moved to the top before they are emptied: none is too deep then for a recursion, a path or the number of
    open files."""
    with contextlib.suppress(OSError):
        os.chmod(folder, 0o700)
        top = os.open(folder, _FOLDER)
        try:
            waiting = _empty(top, top)
            while waiting:
                name = waiting.pop()
                with contextlib.suppress(OSError):
                    place = os.open(name, _FOLDER, dir_fd=top)
                    try:
                        waiting += _empty(place, top)
                    finally:
                        os.close(place)
                    os.rmdir(name, dir_fd=top)
        finally:
            os.close(top)
        folder.rmdir()


def _empty(place: int, top: int) -> list[str]:
    """Removes the files of an open folder and moves the folders in it to ``top`` -> the names that they have there."""
    moved = []
    with os.scandir(place) as entries:
        found = list(entries)
    for entry in found:
        with contextlib.suppress(OSError):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.name, 0o700, dir_fd=place)
                name = uuid.uuid4().hex
                os.rename(entry.name, name, src_dir_fd=place, dst_dir_fd=top)
                moved.append(name)
            else:
                os.unlink(entry.name, dir_fd=place)
    return moved


def _remove_abandoned(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        if folder.is_symlink():
            continue
        try:
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)
        except OSError:
            continue  # in use, another user's, or gone
