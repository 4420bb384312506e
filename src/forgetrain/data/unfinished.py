"""A build of data that is under way: it outlives its process, and the next one goes on with it.

    with unfinished(Path("runs/nano-cpu/data"), key) as work:
        work.folder                     # becomes runs/nano-cpu/data with work.finish()
        if work.due(): work.save()      # what work.state says is durable

It lies beside the folder that it becomes: ``.data.building/state.json`` says what is made (``key``) and how far it
durably is, ``.data.building/data`` holds the files. It goes when it is finished, when something else is to be made, and
when it ends before anything was saved.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forgetrain.durable import no_space_named, replace_folder, write_json
from forgetrain.errors import UserError

#: Seconds of work that a kill loses at most.
SAVE_EVERY = 5.0


class Unfinished:
    """folder: where the files are made. state: what ``save`` makes durable; filled when a build is gone on with."""

    def __init__(self, root: Path, out: Path, key: str):
        self.folder, self.state, self.finished = root / "data", {}, False
        self._file, self._out, self._key = root / "state.json", out, key
        self._saved_at = time.monotonic()
        try:
            kept = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        if kept.get("key") == key:
            self.state: dict[str, Any] = kept["state"]
            return
        for path in (self._file, self.folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.folder.mkdir()

    @property
    def saved(self) -> bool:
        return self._file.is_file()

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= SAVE_EVERY

    def save(self) -> None:
        """The caller has made durable what the state speaks of."""
        write_json(self._file, {"key": self._key, "state": self.state})
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        replace_folder(self.folder, self._out)
        self.finished = True


@contextmanager
def unfinished(out: Path, key: str, *, anew: bool = False) -> Iterator[Unfinished]:
    """``key`` stands for everything that the result depends on; ``anew`` does not go on with what is there.

    Raises:
        UserError: another process builds the same folder, or the disk is full.
    """
    root = out.with_name(f".{out.name}.building")
    with no_space_named(out):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError("another process builds it", file=out, remedy="wait for it, or stop it") from None
        try:
            if anew:
                (root / "state.json").unlink(missing_ok=True)
            work = Unfinished(root, out, key)
            try:
                yield work
            finally:
                if work.finished or not work.saved:
                    shutil.rmtree(root, ignore_errors=True)
        finally:
            os.close(descriptor)
