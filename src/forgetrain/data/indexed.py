"""Megatron's indexed token files: ``PREFIX.bin`` holds the tokens, ``PREFIX.idx`` where documents lie in it.

    with TokenWriter(Path("corpus"), vocab_size=8192) as writer:
        writer.add([np.array([5, 7, 1])])
    TokenFile(Path("corpus")).tokens[:3]

The layout of ``.idx``, little-endian (megatron-core's ``datasets/indexed_dataset.py``): ``MMIDIDX\\0\\0``, version 1 as
uint64, a code for the token's dtype as uint8, the number of sequences and that of document boundaries as uint64; then
each sequence's length as int32, its byte offset in ``.bin`` as int64, and the boundaries of documents, in sequences, as
int64. Here every document is one sequence.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgetrain.durable import no_space_named
from forgetrain.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_LENGTH = np.dtype(np.int32)
#: Bytes of lengths that are turned into an index at a time.
_PIECE = 2**20
_REBUILD = "run forgetrain data build again, or fetch the file again"


def suffixed(prefix: Path, suffix: str) -> Path:
    """``PREFIX.bin`` or ``PREFIX.idx``: appended, for a prefix may hold dots."""
    return Path(f"{prefix}{suffix}")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron picks: uint16 below 65,500 tokens, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class TokenWriter:
    """Writes both files. Its memory does not grow: lengths go to a file of their own, ``PREFIX.lengths``, until the
    index is written. What ``sync`` made durable can be gone on from: ``TokenWriter(prefix, vocab_size, tokens=...,
    documents=...)`` cuts off what came after it."""

    def __init__(self, prefix: Path, vocab_size: int, *, tokens: int = 0, documents: int = 0):
        """tokens, documents: how much of what lies there is kept."""
        self.prefix, self.dtype = prefix, token_dtype(vocab_size)
        self.tokens, self.documents = tokens, documents
        self._bin = _opened(suffixed(prefix, ".bin"), tokens * self.dtype.itemsize)
        self._lengths = _opened(suffixed(prefix, ".lengths"), documents * _LENGTH.itemsize)

    def __enter__(self) -> TokenWriter:
        return self

    def add(self, documents: Iterable[NDArray[Any]]) -> None:
        """Appends documents, each already ended by its end-of-document token."""
        for document in documents:
            self.extend(document, np.array([len(document)]))

    def extend(self, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Appends documents that lie one after another: tokens [T], lengths [documents]."""
        with no_space_named(suffixed(self.prefix, ".bin")):
            self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
            self._lengths.write(lengths.astype(_LENGTH, copy=False).tobytes())
        self.tokens += len(tokens)
        self.documents += len(lengths)

    def sync(self) -> None:
        """Makes durable what was added so far."""
        with no_space_named(suffixed(self.prefix, ".bin")):
            for file in (self._bin, self._lengths):
                file.flush()
                os.fsync(file.fileno())

    def take_last(self) -> NDArray[Any]:
        """Takes the last document out again and returns its tokens; the files are cut when they are closed."""
        self._lengths.seek((self.documents - 1) * _LENGTH.itemsize)
        length = int(np.frombuffer(self._lengths.read(_LENGTH.itemsize), _LENGTH)[0])
        self.tokens -= length
        self.documents -= 1
        self._bin.seek(self.tokens * self.dtype.itemsize)
        document = np.frombuffer(self._bin.read(length * self.dtype.itemsize), self.dtype)
        for file, size in self._sizes().items():
            file.seek(size)
        return document

    def _sizes(self) -> dict[Any, int]:
        return {self._bin: self.tokens * self.dtype.itemsize, self._lengths: self.documents * _LENGTH.itemsize}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sizes = self._sizes()
        try:
            for file, size in sizes.items() if kind is None else ():
                file.truncate(size)
            self.sync()
        finally:
            for file in sizes:
                file.close()
        if kind is None:
            self._write_index()
            suffixed(self.prefix, ".lengths").unlink()

    def _write_index(self) -> None:
        path, lengths_path = suffixed(self.prefix, ".idx"), suffixed(self.prefix, ".lengths")
        with no_space_named(path), path.open("wb") as file, lengths_path.open("rb") as lengths:
            file.write(_HEADER.pack(_MAGIC, 1, _CODES[self.dtype], self.documents, self.documents + 1))
            shutil.copyfileobj(lengths, file)
            lengths.seek(0)
            place = 0
            while piece := lengths.read(_PIECE):
                ends = place + np.cumsum(np.frombuffer(piece, _LENGTH), dtype=np.int64) * self.dtype.itemsize
                file.write(np.concatenate([[place], ends[:-1]]).astype(np.int64).tobytes())
                place = int(ends[-1])
            for first in range(0, self.documents + 1, _PIECE):
                file.write(np.arange(first, min(first + _PIECE, self.documents + 1), dtype=np.int64).tobytes())
            file.flush()
            os.fsync(file.fileno())


def _opened(path: Path, size: int) -> Any:
    """The file open for reading and writing at its end, cut to ``size`` bytes."""
    if size == 0:
        return path.open("w+b")
    file = path.open("r+b")
    if path.stat().st_size < size:
        file.close()
        raise UserError(f"is truncated: {path.stat().st_size} bytes of {size}", file=path, remedy=f"{_REBUILD} --force")
    file.truncate(size)
    file.seek(size)
    return file


class TokenFile:
    """Reads a ``.bin/.idx`` pair, ours or anyone's, through memory maps.

    tokens: all tokens, one after another. document_starts: int64 [documents + 1], where each document begins in
    ``tokens``, and their end.
    """

    def __init__(self, prefix: Path):
        """Raises UserError when a file is missing, is no index, or is shorter than its index says."""
        self.prefix = prefix
        bin_path, idx_path = suffixed(prefix, ".bin"), suffixed(prefix, ".idx")
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise UserError("no such token file", file=path, remedy=_REBUILD)
        with idx_path.open("rb") as file:
            head = file.read(_HEADER.size)
        magic, version, code, sequences, bounds = (
            _HEADER.unpack(head) if len(head) == _HEADER.size else (b"",) + (0,) * 4
        )
        if magic != _MAGIC or version != 1 or code not in _DTYPES:
            raise UserError("is not a Megatron index of whole numbers", file=idx_path, remedy=_REBUILD)
        self.dtype = np.dtype(_DTYPES[code])
        expected = _HEADER.size + sequences * 12 + bounds * 8
        if idx_path.stat().st_size < expected:
            raise UserError(
                f"is truncated: {idx_path.stat().st_size} bytes of {expected}", file=idx_path, remedy=_REBUILD
            )
        offset = _HEADER.size
        lengths = self._map(idx_path, np.dtype(np.int32), offset, sequences)
        pointers = self._map(idx_path, np.dtype(np.int64), offset + 4 * sequences, sequences)
        boundaries = self._map(idx_path, np.dtype(np.int64), offset + 12 * sequences, bounds)
        starts = np.zeros(sequences + 1, np.int64)
        np.cumsum(lengths, dtype=np.int64, out=starts[1:])
        count = int(starts[-1])
        if not np.array_equal(pointers, starts[:-1] * self.dtype.itemsize):
            raise UserError(
                "its sequences do not lie one after another",
                file=idx_path,
                remedy="merge the file with Megatron's tools",
            )
        if bounds < 1 or int(boundaries[-1]) != sequences or (np.diff(boundaries) < 0).any():
            raise UserError("its document boundaries are damaged", file=idx_path, remedy=_REBUILD)
        if bin_path.stat().st_size != count * self.dtype.itemsize:
            raise UserError(
                f"is truncated or damaged: {bin_path.stat().st_size} bytes where its index says "
                f"{count * self.dtype.itemsize}",
                file=bin_path,
                remedy=_REBUILD,
            )
        self.document_starts: NDArray[np.int64] = np.unique(starts[boundaries])  # an empty document is none
        self.tokens = self._map(bin_path, self.dtype, 0, count)

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.document_starts) - 1

    @staticmethod
    def _map(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> NDArray[Any]:
        if count == 0:
            return np.zeros(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
