"""One source's text to two token files, that to train on and that held out, in processes and resumable.

    entry = tokenise(source, "00-web", settings, vocab_size, work, workers=2, say=say)

A document is held out when the SHA-256 of its text, read as a fraction, lies below ``data.held_out``: a pure function
of the text, so it survives reordering and new files. When that would leave one side empty, the last document goes
there; a source of one document gives its last lines.

Documents are read here and tokenised in workers; results are written in the order of the documents, so that neither the
number of workers nor a kill changes a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forgetrain.data.corpus import Document, Reading, documents, source_files, source_root
from forgetrain.data.indexed import TokenWriter, suffixed
from forgetrain.data.unfinished import Unfinished
from forgetrain.data.worker import Encoder, Settings, Workers, is_held_out
from forgetrain.errors import UserError
from forgetrain.spec.target import Source

#: Called with (what is done now, bytes done, bytes in all).
Report = Callable[[str, int, int], None]

#: Characters of text that a worker is given at a time; about 100 bytes of its memory for each token of them.
BATCH = 2**20
#: A source of fewer bytes is tokenised in this process: starting others would take longer.
SMALL = 4 * 2**20
SPLITS = {False: "train", True: "held_out"}


def tokenise(
    source: Source, name: str, settings: Settings, vocab_size: int, work: Unfinished, *, workers: int, say: Report
) -> dict[str, Any]:
    """Writes ``NAME.train`` and ``NAME.held-out`` in ``work.folder`` and returns the source's entry in the manifest.

    ``work.state["source"]`` is how far it durably is; when it is there already, the work goes on after it. The entry is
    put into ``work.state["entries"]``.

    Raises:
        UserError: what the source cannot be read for, no text to hold out, a full disk, a worker that ended.
    """
    past = work.state.get("source") or {"reading": Reading().as_dict(), "bytes": 0, "train": [0, 0], "held_out": [0, 0]}
    reading, size = Reading.of(past["reading"]), past["bytes"]
    small = 0 < sum(path.stat().st_size for path in source_files(source)) - reading.done < SMALL
    what = f"tokenising {source.path}" if size == 0 else f"going on tokenising {source.path}"
    writers = {side: _writer(work.folder / name, side, vocab_size, past[split]) for side, split in SPLITS.items()}
    with writers[False] as train, writers[True] as held_out:
        with Workers(0 if small else workers, settings) as pool:
            for encoded, now in pool.encode(_batches(documents(source, reading), reading)):
                for side, writer in writers.items():
                    writer.extend(encoded.tokens[side], encoded.lengths[side])
                size += encoded.size
                say(what, now["done"], now["total"])
                if work.due() and train.documents + held_out.documents > 1:  # a lone document is yet to be cut
                    _save(work, writers, reading=now, bytes=size)
        _give_both_sides(source, settings, writers)
        entry = work.state.setdefault("entries", {})[name] = _entry(source, reading, size, writers)
        work.state["source"] = None
        if work.due() or work.saved:  # before the indices are written: write_indices ends what a kill leaves
            _save(work, writers)
    return entry


def _save(work: Unfinished, writers: dict[bool, TokenWriter], **progress: Any) -> None:
    for writer in writers.values():
        writer.sync()
    if progress:
        counts = {SPLITS[side]: [writer.tokens, writer.documents] for side, writer in writers.items()}
        work.state["source"] = progress | counts
    work.save()


def write_indices(folder: Path, entry: dict[str, Any], vocab_size: int) -> None:
    """Ends what a kill after the last save of a source left undone: indices are written, then lengths removed."""
    for split in SPLITS.values():
        prefix, documents = folder / entry[split]["prefix"], entry[split]["documents"][1]
        if suffixed(prefix, ".lengths").is_file():
            with TokenWriter(prefix, vocab_size, tokens=entry[split]["tokens"], documents=documents):
                pass


def require_text(source: Source) -> None:
    """Reads a source's first document, so that what cannot be read at all is refused before others are tokenised."""
    reading = Reading()
    if next(documents(source, reading), None) is None:
        raise _empty(source, reading)


def training_texts(source: Source, held_out: float) -> Iterator[str]:
    """The texts of the documents that are not held out."""
    stream, sides = documents(source, Reading()), set()
    last = next(stream, None)
    for document in stream:
        assert last is not None
        sides.add(side := is_held_out(last.text.encode(), held_out))
        if not side:
            yield last.text
        last = document
    if last is None:
        return
    if not sides:
        yield _cut(last, held_out)[0]
    elif sides == {True} or (len(sides) == 2 and not is_held_out(last.text.encode(), held_out)):
        yield last.text


def _writer(prefix: Path, held: bool, vocab_size: int, past: list[int]) -> TokenWriter:
    path = prefix.with_name(f"{prefix.name}.{'held-out' if held else 'train'}")
    return TokenWriter(path, vocab_size, tokens=past[0], documents=past[1])


def _batches(stream: Iterator[Document], reading: Reading) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Texts of about ``BATCH`` characters, and how far reading was after the last of them."""
    texts: list[str] = []
    size = 0
    for document in stream:
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH:
            yield texts, reading.as_dict()
            texts, size = [], 0
    if texts:
        yield texts, reading.as_dict()


def _give_both_sides(source: Source, settings: Settings, writers: dict[bool, TokenWriter]) -> None:
    train, held_out = writers[False], writers[True]
    if train.documents + held_out.documents == 1:
        (train if train.documents else held_out).take_last()
        parts = _cut(next(documents(source, Reading())), settings.held_out)
        encoded = Encoder(settings).encode_as(parts, [False, True][: len(parts)], 0)
        for side, writer in writers.items():
            writer.extend(encoded.tokens[side], encoded.lengths[side])
        return
    for side, writer in writers.items():
        if writer.documents == 0 and writers[not side].documents > 1:
            writer.add([writers[not side].take_last()])


def _cut(document: Document, fraction: float) -> list[str]:
    """A lone document in two, cut after a line near its end (or anywhere, when it is one line)."""
    text = document.text
    wanted = max(1, int(len(text) * (1 - fraction)))
    line = text.rfind("\n", 0, wanted) + 1
    cut = line if line > len(text) // 2 else wanted
    return [part for part in (text[:cut], text[cut:]) if part]


def _entry(source: Source, reading: Reading, size: int, writers: dict[bool, TokenWriter]) -> dict[str, Any]:
    if not all(writer.tokens for writer in writers.values()):
        raise _empty(source, reading)
    entry: dict[str, Any] = {
        "documents": sum(writer.documents for writer in writers.values()),
        "tokens": sum(writer.tokens for writer in writers.values()),
        "bytes": size,
        "rejects": dict(reading.reasons),
        "rejected": reading.names,
    }
    for side, writer in writers.items():
        entry[SPLITS[side]] = {
            "prefix": writer.prefix.name,
            "documents": [0, writer.documents],
            "tokens": writer.tokens,
        }
    return entry


def _empty(source: Source, reading: Reading) -> UserError:
    named = ", ".join(reading.names[:3])
    return UserError(
        "is an empty corpus: no text to train on and to hold out" + (f" ({named})" if named else ""),
        file=source_root(source),
        remedy="name files that hold more text",
    )
