"""Sources of documents: files and folders of text, JSON lines, and the Python standard library.

    rejects = Rejects()
    for document in documents(Source(path="books", glob="**/*.txt"), rejects):
        document.name, document.text

Documents come in sorted order of their names, so a corpus is the same on every machine that holds the same files. A
folder's unreadable files are rejected, counted and named; a single file that is no text is refused.
"""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from forgetrain.errors import UserError
from forgetrain.spec.target import Source

STDLIB = "python-stdlib"
#: Folders of the standard library that hold no library: other people's packages, tests, caches.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
#: A text file is read in pieces of at most this many bytes, cut after a line; each piece is one document. It bounds
#: the memory that a file larger than it takes.
PIECE = 32 * 2**20
#: Rejects beyond this many are counted but not named.
NAMED_REJECTS = 20


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass
class Rejects:
    """What a source held that is no document: how many for each reason, and the first names."""

    reasons: Counter[str] = field(default_factory=Counter)
    names: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.reasons[reason] += 1
        if len(self.names) < NAMED_REJECTS:
            self.names.append(f"{name}: {reason}")


def source_root(source: Source) -> Path:
    return Path(sysconfig.get_path("stdlib")) if source.path == STDLIB else Path(source.path)


def source_files(source: Source) -> list[Path]:
    """The files of a source, sorted. Raises UserError when there are none."""
    root = source_root(source)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(
            "no such file or folder",
            key="data.sources",
            value=source.path,
            remedy=f"name a file, a folder, {STDLIB!r}, or the prefix of .bin and .idx files",
        )
    skipped = STDLIB_SKIPPED if source.path == STDLIB else frozenset()
    files = [path for path in root.glob(source.glob) if path.is_file() and _wanted(path.relative_to(root), skipped)]
    if not files:
        raise UserError(
            f"is an empty corpus: no file matches glob = {source.glob!r}",
            file=source.path,
            remedy="name a folder that holds text, or change the glob",
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _wanted(relative: Path, skipped: frozenset[str]) -> bool:
    return not any(part.startswith(".") or part in skipped for part in relative.parts)


def documents(source: Source, rejects: Rejects) -> Iterator[Document]:
    """The documents of a source of text in order.

    Raises:
        UserError: nothing there, or a single file that is binary.
    """
    root = source_root(source)
    single = root.is_file()
    for path in source_files(source):
        name = path.name if single else path.relative_to(root).as_posix()
        if name.endswith((".jsonl", ".jsonl.gz")):
            yield from _json_lines(path, name, source.field, rejects)
            continue
        if path.stat().st_size == 0:
            rejects.add(name, "empty")
        with path.open("rb") as file:
            for number, piece in enumerate(_pieces(file)):
                text = _decode(piece)
                if text is None and single:
                    raise UserError("is binary, not UTF-8 text", file=path, remedy="name files of text, or .jsonl(.gz)")
                if text is None:
                    rejects.add(name, "not UTF-8 text")
                    break
                if not text.strip():
                    rejects.add(name, "empty")
                    continue
                yield Document(name if number == 0 else f"{name}#{number}", text)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        if len(piece) == PIECE:
            piece += file.readline(PIECE)
        yield piece


def _decode(raw: bytes) -> str | None:
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _json_lines(path: Path, name: str, key: str, rejects: Rejects) -> Iterator[Document]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, start=1):
                where = f"{name}:{number}"
                try:
                    record = json.loads(line)
                except ValueError:
                    rejects.add(where, "not a JSON line")
                    continue
                text = record.get(key) if isinstance(record, dict) else None
                if not isinstance(text, str):
                    rejects.add(where, f"no text under {key!r}")
                elif not text.strip():
                    rejects.add(where, "empty")
                else:
                    yield Document(where, text)
        except (gzip.BadGzipFile, EOFError) as error:
            raise UserError(f"is a damaged gzip file ({error})", file=path, remedy="fetch or make it again") from None
