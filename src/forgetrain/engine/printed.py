"""What a child prints: read for ever, kept at the end only."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Any

from forgetrain.engine.admit import printable

_TAIL = 64 << 10  # bytes kept


class Tail:
    """Drains a pipe for ever, so that a child never blocks on printing, and keeps the last of it."""

    def __init__(self, pipe: Any):
        self._pipe, self._chunks, self._size = pipe, deque[bytes](), 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    def text(self) -> str:
        with self._lock:
            return printable(b"".join(self._chunks)[-_TAIL:].decode(errors="replace"))

    def close(self) -> None:
        self._thread.join(timeout=1)  # what the dead child printed last is still in the pipe
        if not self._thread.is_alive():
            self._pipe.close()

    def _drain(self) -> None:
        while chunk := os.read(self._pipe.fileno(), _TAIL):
            with self._lock:
                self._chunks.append(chunk)
                self._size += len(chunk)
                while self._size - len(self._chunks[0]) > _TAIL:
                    self._size -= len(self._chunks.popleft())
