"""Sources of documents: files and folders of text or records, data sets, and the Python standard library.

    reading = Reading()
    for document in documents(Source(path="books", glob="**/*.txt"), reading):
        document.name, document.text

Documents come in sorted order of their files' names, so a corpus is the same on every machine that holds the same
files. A folder's unreadable files are rejected, counted and named; a single file that is no text is refused, and so is
a damaged file of records.
"""

from __future__ import annotations

import codecs
import glob
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

from forgetrain.data.sources import HUB, RECORD_FILES, Reading, data_set_records, file_records, is_data_set, text_of
from forgetrain.errors import UserError
from forgetrain.spec.target import Source

STDLIB = "python-stdlib"
#: Folders of the standard library that hold no library: other people's packages, tests, caches.
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
#: A text file is read in pieces of at most this many bytes, cut after a line; each piece is one document. It bounds
#: the memory that a file larger than it takes: about 100 bytes a token while it is tokenised.
PIECE = 8 * 2**20


@dataclass(frozen=True)
class Document:
    name: str
    text: str


def source_root(source: Source) -> Path:
    return Path(sysconfig.get_path("stdlib")) if source.path == STDLIB else Path(source.path)


def source_files(source: Source) -> list[Path]:
    """The files of a source, sorted; none for a data set of the hub. Raises UserError when a folder has none."""
    if source.path.startswith(HUB):
        return []
    if source.split is not None and not is_data_set(source.path):
        raise UserError(
            "is of a data set, and this is none",
            file=source.path,
            key="data.sources.split",
            value=source.split,
            remedy="leave it out",
        )
    root = source_root(source)
    if root.suffix in (".bin", ".idx") and all(root.with_suffix(end).is_file() for end in (".bin", ".idx")):
        raise UserError(
            "is one of a pair of Megatron's token files",
            key="data.sources",
            value=source.path,
            remedy=f"name the pair by its prefix, {source.path[:-4]}",
        )
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UserError(
            "no such file or folder",
            key="data.sources",
            value=source.path,
            remedy=f"name a file, a folder, {STDLIB!r}, {HUB}org/name, or the prefix of .bin and .idx files",
        )
    skipped = STDLIB_SKIPPED if source.path == STDLIB else frozenset()
    pattern = "**/*" if is_data_set(source.path) else source.glob
    _require_pattern(pattern, source.path)
    if "**" in pattern:
        _require_finite(root, skipped)
    found = {root / name for name in glob.glob(pattern, root_dir=root, recursive=True)}  # pathlib's ** follows no links
    files = [path for path in found if path.is_file() and _wanted(path.relative_to(root), skipped)]
    if not files:
        raise UserError(
            f"is an empty corpus: no file matches glob = {source.glob!r}",
            file=source.path,
            remedy="name a folder that holds text, or change the glob",
        )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _require_pattern(pattern: str, path: str) -> None:
    relative = not PurePath(pattern).is_absolute()
    if relative and not any("**" in part and part != "**" for part in PurePath(pattern).parts):
        return
    problem = "two stars are a whole part of a path" if relative else "Non-relative patterns are unsupported"
    raise UserError(
        f"is no pattern ({problem})",
        file=path,
        key="data.sources.glob",
        value=pattern,
        remedy="write one relative to the folder, such as **/*.txt",
    )


def _require_finite(folder: Path, skipped: frozenset[str], around: tuple[tuple[int, int], ...] = ()) -> None:
    """Raises the OSError of a folder within that cannot be listed, which glob would pass over in silence, and refuses a
    link to a folder around it, which glob would follow without end. A file system's own lost+found is root's alone, and
    no corpus."""
    status = folder.stat()
    itself = (status.st_dev, status.st_ino)
    if itself in around:
        raise UserError(
            "is, by a link, a folder that it lies in", file=folder, remedy="remove the link, or name another glob"
        )
    with os.scandir(folder) as entries:
        inside = sorted(entry.name for entry in entries if entry.is_dir())
    for name in inside:
        if _wanted(PurePath(name), skipped | {"lost+found"}):
            _require_finite(folder / name, skipped, (*around, itself))


def _wanted(relative: PurePath, skipped: frozenset[str]) -> bool:
    return not any(part.startswith(".") or part in skipped for part in relative.parts)


def documents(source: Source, reading: Reading) -> Iterator[Document]:
    """The documents of a source of text in order; ``reading`` says how far it is, and what was rejected.

    Reading begins where ``reading`` says, and it is up to date with each document that comes: kept and given again, it
    goes on with the next one.

    Raises:
        UserError: nothing there, a single file that is binary, damaged records, or records without the wanted fields.
    """
    if is_data_set(source.path):
        for record in data_set_records(source, reading):
            if (text := text_of(record, source, source.path, reading)) is not None:
                yield Document(record.name, text)
        return
    root = source_root(source)
    single = root.is_file()
    files = source_files(source)
    sizes = [path.stat().st_size for path in files]
    reading.total, begun = sum(sizes), reading.file
    for number, path in enumerate(files[begun:], start=begun):
        if number > begun:
            reading.file, reading.record = number, 0
        reading.done = sum(sizes[:number])
        name = path.name if single else path.relative_to(root).as_posix()
        if not name.endswith(RECORD_FILES):
            yield from _text(path, name, single, reading)
            continue
        for record in file_records(path, name, source, reading):
            if (text := text_of(record, source, path, reading)) is not None:
                yield Document(record.name, text)
    reading.file, reading.record = len(files), 0


def _text(path: Path, name: str, single: bool, reading: Reading) -> Iterator[Document]:
    before, past = reading.done, reading.record
    if path.stat().st_size == 0:
        reading.reject(name, "empty")
    with path.open("rb") as file:
        for number, piece in enumerate(_pieces(file)):
            if number < past:
                continue
            text = _decode(piece)
            if text is None and single:
                formats = ", ".join(RECORD_FILES)
                raise UserError("is binary, not UTF-8 text", file=path, remedy=f"name files of text, or {formats}")
            if text is None:
                reading.reject(name, "not UTF-8 text")
                break
            reading.done, reading.record = before + file.tell(), number + 1
            if not text.strip():
                reading.reject(name, "empty")
                continue
            yield Document(name if number == 0 else f"{name}#{number}", text)
    reading.done = before + path.stat().st_size


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        if len(piece) == PIECE:
            rest = file.readline(PIECE)
            piece += rest
            if len(rest) == PIECE:  # the line is longer, and the cut may lie within a character
                split = _unfinished(piece)
                file.seek(-split, os.SEEK_CUR)
                piece = piece[: len(piece) - split]
        yield piece


def _unfinished(piece: bytes) -> int:
    """How many bytes at the end, at most 3, begin a character that ends after them."""
    end = piece[-3:]
    return len(end) - codecs.utf_8_decode(end, "ignore")[1]


def _decode(raw: bytes) -> str | None:
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
