"""Tokenising in processes: batches of texts go to workers, and come back in the order in which they went.

    with Workers(2, Settings(Path("tokenizer/tokenizer.json"), eos=1, dtype="uint16", held_out=0.01)) as workers:
        for encoded, what in workers.encode([(["one text", "another"], "batch 0")]):
            encoded.tokens[False], encoded.lengths[False]

A worker speaks through its pipes, loads nothing but ``tokenizers`` and numpy, tokenises on one core, and ends when its
parent does. What comes back depends on nothing but the texts and the settings.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from forgetrain.errors import UserError

#: Batches that are out or back for each worker before the first of them is taken.
_AHEAD = 2
_COMMAND = [sys.executable, "-P", "-c", "from forgetrain.data.worker import main; main()"]
What = TypeVar("What")


@dataclass(frozen=True)
class Settings:
    """What a text's tokens depend on beside the text; ``tokenizer`` is a tokenizer.json."""

    tokenizer: Path
    eos: int
    dtype: str
    held_out: float


@dataclass(frozen=True)
class Encoded:
    """The documents of a batch, those held out (True) apart: tokens [T] one after another, each document ended by
    ``eos``; lengths int32 [documents]. size: bytes of the texts in UTF-8."""

    tokens: dict[bool, NDArray[Any]]
    lengths: dict[bool, NDArray[np.int32]]
    size: int


def is_held_out(raw: bytes, fraction: float) -> bool:
    """Whether the SHA-256 of a document's text in UTF-8, read as a fraction, lies below ``fraction``."""
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64 < fraction


class Encoder:
    """Tokenises in this process."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._tokenizer = Tokenizer.from_str(settings.tokenizer.read_text(encoding="utf-8"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text is four characters, not the end of it

    def encode(self, texts: list[str]) -> Encoded:
        raw = [text.encode() for text in texts]
        held = [is_held_out(text, self.settings.held_out) for text in raw]
        return self.encode_as(texts, held, sum(map(len, raw)))

    def encode_as(self, texts: list[str], held: list[bool], size: int) -> Encoded:
        """With the side of each text given; ``size`` is their bytes."""
        documents: dict[bool, list[list[int]]] = {False: [], True: []}
        for encoding, side in zip(
            self._tokenizer.encode_batch_fast(texts, add_special_tokens=False), held, strict=True
        ):
            documents[side].append(encoding.ids)
        tokens, lengths = {}, {}
        for side, found in documents.items():
            lengths[side] = np.array([len(ids) + 1 for ids in found], np.int32)
            tokens[side] = np.full(int(lengths[side].sum()), self.settings.eos, self.settings.dtype)
            place = 0
            for ids in found:
                tokens[side][place : place + len(ids)] = ids
                place += len(ids) + 1
        return Encoded(tokens, lengths, size)


class Workers:
    """``count`` processes that tokenise; with none, this process does."""

    def __init__(self, count: int, settings: Settings):
        self._count, self._settings = count, settings
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(max(count, 1), thread_name_prefix="forgetrain-tokenise")

    def __enter__(self) -> Workers:
        # the variable is the library's own switch: a worker is one core, not a pool of threads
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        for _ in range(self._count):
            process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            self._processes.append(process)
            self._idle.put(process)
            with suppress(OSError):  # one that is dead already is named when it is asked for something
                _send(process, self._settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for process in self._processes:
                process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            with suppress(OSError):  # what a killed one was still to be sent
                process.__exit__(None, None, None)  # closes its pipes, at which it ends, and waits for it

    def encode(self, batches: Iterable[tuple[list[str], What]]) -> Iterator[tuple[Encoded, What]]:
        """Each batch encoded, with what came beside it, in their order; few batches are in memory at a time.

        Raises:
            UserError: a worker ended before its time.
        """
        if self._count == 0:
            encoder = Encoder(self._settings)
            for texts, what in batches:
                yield encoder.encode(texts), what
            return
        waiting: deque[tuple[Future[Encoded], What]] = deque()
        for texts, what in batches:
            waiting.append((self._threads.submit(self._ask, texts), what))
            while waiting and (len(waiting) > _AHEAD * self._count or waiting[0][0].done()):
                future, beside = waiting.popleft()
                yield future.result(), beside
        for future, beside in waiting:
            yield future.result(), beside

    def _ask(self, texts: list[str]) -> Encoded:
        process = self._idle.get()
        try:
            _send(process, texts)
            assert process.stdout is not None
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise UserError(
                f"a tokenising process ended early (exit code {process.wait()})",
                remedy="see whether memory ran out, give --workers a smaller number, and run the command again",
            ) from None
        finally:
            self._idle.put(process)


def _send(process: subprocess.Popen[bytes], what: object) -> None:
    assert process.stdin is not None
    pickle.dump(what, process.stdin, pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()


def main() -> None:
    """A worker: settings first, then batches of texts until the pipe is closed."""
    try:
        encoder = Encoder(pickle.load(sys.stdin.buffer))
        while True:
            pickle.dump(encoder.encode(pickle.load(sys.stdin.buffer)), sys.stdout.buffer, pickle.HIGHEST_PROTOCOL)
            sys.stdout.buffer.flush()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent is done, gone, or was told to stop
        os._exit(0)
