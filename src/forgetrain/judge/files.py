"""A folder of files named by the SHA-256 of their content: written once, whole, and never changed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from forgetrain.durable import no_space_named, sync_folder
from forgetrain.errors import UserError


def content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Files:
    """``folder/ab/abcdef...``; safe to use from several processes and against a kill at any moment."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, digest: str) -> Path:
        return self.folder / digest[:2] / digest

    def add(self, content: bytes) -> str:
        """Stores the content unless it is there already, durably, and returns its hash.

        Raises UserError when the disk is full."""
        digest = content_hash(content)
        path = self.path(digest)
        if path.is_file() and path.stat().st_size == len(content):
            return digest
        with no_space_named(path), self._locked(fcntl.LOCK_SH):
            self._write(path, content)
        return digest

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o444)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        sync_folder(path.parent)  # the name, too, must survive a power cut before the ledger mentions it

    def sweep(self) -> None:
        """Removes what a kill left half written, unless somebody writes just now."""
        with contextlib.suppress(BlockingIOError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
            for path in self.folder.glob("*/.new-*"):
                path.unlink()

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, how)
            yield

    def read(self, digest: str) -> bytes:
        """The content. Raises UserError when it is missing or is not what its name says."""
        path = self.path(digest)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UserError("the ledger's file is missing", file=path, remedy="restore it from a backup") from None
        if content_hash(content) != digest:
            raise UserError("the ledger's file was changed", file=path, remedy="restore it from a backup")
        return content
