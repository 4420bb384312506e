"""``forgetrain data build``: sources to a folder of tokens, a tokenizer and a manifest.

    data = build_data(target, Path("runs/nano-cpu/data"))

The folder appears whole or not at all::

    manifest.json                      what it was made of, counts, SHA-256 of every file
    tokenizer/                         tokenizer.json, tokenizer_config.json
    00-python-stdlib.train.bin .idx    Megatron's format, every document ended by the end-of-document token
    00-python-stdlib.held-out.bin .idx

A document is held out when the SHA-256 of its text, read as a fraction, lies below ``data.held_out``: a pure function
of the text, so it survives reordering and new files. A source of one document gives its last lines instead. Megatron
files that the user names stay where they are; their last documents are held out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgetrain.data.corpus import STDLIB, Document, Reading, documents, source_files, source_root
from forgetrain.data.folder import FORMAT, MANIFEST, TOKENIZER, DataFolder, open_data
from forgetrain.data.indexed import TokenFile, TokenWriter, suffixed
from forgetrain.data.tokenizer import (
    BOS,
    EOS,
    TokenizerFolder,
    copy_tokenizer,
    open_tokenizer,
    save_trained,
    train_tokenizer,
)
from forgetrain.durable import new_folder, sha256_file, write_json
from forgetrain.errors import UserError
from forgetrain.spec.target import Source, Target

#: Text is tokenised in batches of about this many characters: enough to keep all cores at work.
BATCH = 4 * 2**20
#: A tokenizer is trained on at most this much text of each source, its first.
TRAINED_ON = 128 * 2**20
_SCAN = 2**24

#: Called with (what is done now, bytes done, bytes in all).
Report = Callable[[str, int, int], None]


def build_data(target: Target, out: Path, *, force: bool = False, report: Report | None = None) -> DataFolder:
    """Builds the data of a target in ``out``; does nothing when ``out`` was built from the same sources and settings.

    Raises:
        UserError: an empty corpus, a binary file, a tokenizer larger than the vocabulary, a truncated token file, a
            full disk. ``out`` is then as it was.
    """
    say = report or (lambda what, done, total: None)
    key = _inputs_key(target)
    if not force and (out / MANIFEST).is_file():
        built = open_data(out, target)
        if built.manifest["key"] == key:
            return built
    began = time.monotonic()
    with new_folder(out) as folder:
        tokenizer = _make_tokenizer(target, folder / TOKENIZER, say)
        entries, train_counts, held_counts = [], [], []
        for number, source in enumerate(target.data.sources):
            if _is_token_file(source):
                entry, counts = _take_tokens(source, target)
            else:
                entry, counts = _tokenise(number, source, target, tokenizer, folder, say)
            entries.append(entry | {"path": source.path, "weight": source.weight})
            train_counts.append(counts[0])
            held_counts.append(counts[1])
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "key": key,
                "target": target.name,
                "vocab_size": target.model.vocab_size,
                "tokenizer": {
                    "sha256": tokenizer.sha256,
                    "vocab_size": tokenizer.vocab_size,
                    "eos": tokenizer.eos,
                    "bos": tokenizer.bos,
                    "pad": tokenizer.pad,
                },
                "sources": entries,
                "unigram_loss": unigram_loss(train_counts, [s.weight for s in target.data.sources], held_counts),
                "seconds": round(time.monotonic() - began, 2),
                "files": {
                    path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                },
            },
        )
    return open_data(out, target)


def unigram_loss(
    train: list[NDArray[np.int64]], weights: list[float], held_out: list[NDArray[np.int64]]
) -> dict[str, float]:
    """Nats a token of the model that knows only how frequent each token is: what a trained model must be well below.

    Frequencies are those of the training tokens, one added to each count, mixed as the sources are.
    """
    total = sum(weights)
    shares = [
        (counts + 1) / (counts + 1).sum() * (weight / total) for counts, weight in zip(train, weights, strict=True)
    ]
    log_p = np.log(np.sum(shares, axis=0))

    def loss(counts: NDArray[Any]) -> float:
        return float(-(counts * log_p).sum() / counts.sum())

    mixed = np.sum([c / max(c.sum(), 1) * w for c, w in zip(train, weights, strict=True)], axis=0)
    return {"train": loss(mixed), "held_out": loss(np.sum(held_out, axis=0))}


def _inputs_key(target: Target) -> str:
    """SHA-256 of everything the built folder depends on: settings, and name, size and time of every source file."""
    model = target.model
    # what stages take, and when, is the loader's affair
    data = target.data.model_dump(mode="json", exclude={"stages": True, "sources": {"__all__": {"name"}}})
    settings: list[Any] = [FORMAT, data, model.vocab_size, model.max_position_embeddings]
    settings += [model.eos_token_id, model.bos_token_id, model.pad_token_id]
    settings[1].pop("documents")  # how documents are masked is the loader's affair
    for source in target.data.sources:
        if _is_token_file(source):
            files = [suffixed(Path(source.path), suffix) for suffix in (".bin", ".idx")]
        else:
            files = source_files(source)
        settings.append([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    if target.data.tokenizer is not None and (file := Path(target.data.tokenizer)).exists():
        settings.append(sha256_file(file if file.is_file() else file / "tokenizer.json"))
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _is_token_file(source: Source) -> bool:
    return source.path != STDLIB and suffixed(Path(source.path), ".idx").is_file()


def _make_tokenizer(target: Target, folder: Path, say: Report) -> TokenizerFolder:
    sources = [source for source in target.data.sources if not _is_token_file(source)]
    if target.data.tokenizer is not None:
        copy_tokenizer(Path(target.data.tokenizer), folder)
        return open_tokenizer(folder, target.model)
    if len(sources) < len(target.data.sources):
        raise UserError(
            "is not set, but a source is a token file",
            key="data.tokenizer",
            remedy="name the tokenizer it was made with",
        )
    total = sum(min(TRAINED_ON, sum(f.stat().st_size for f in source_files(source))) for source in sources)
    done = 0

    def texts() -> Iterator[str]:
        nonlocal done
        for source in sources:
            taken = 0
            for document, held in _split(documents(source, Reading()), target):
                if not held:
                    yield document.text
                    taken += len(document.text)
                    done += len(document.text)
                    say("reading for the tokenizer", done, total)
                if taken >= TRAINED_ON:
                    break
        say("training the tokenizer", total, total)

    tokenizer = train_tokenizer(texts(), target.model.vocab_size)
    save_trained(tokenizer, folder, target.model)
    opened = open_tokenizer(folder, target.model)
    _require_ids(target, opened)
    return opened


def _require_ids(target: Target, tokenizer: TokenizerFolder) -> None:
    """A tokenizer trained here has ids of its own; a target that names others would train on the wrong tokens."""
    for key, token in (("eos_token_id", EOS), ("bos_token_id", BOS)):
        wanted, actual = getattr(target.model, key), tokenizer.tokenizer.token_to_id(token)
        if (wanted[0] if isinstance(wanted, list) else wanted) not in (None, actual):
            raise UserError(
                f"is not {token} of the tokenizer trained here",
                key=f"model.{key}",
                value=wanted,
                remedy=f"leave it out, set it to {actual}, or name the tokenizer you mean in data.tokenizer",
            )


def _is_held_out(document: Document, target: Target) -> bool:
    digest = hashlib.sha256(document.text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < target.data.held_out


def _tokenise(
    number: int, source: Source, target: Target, tokenizer: TokenizerFolder, folder: Path, say: Report
) -> tuple[dict[str, Any], list[NDArray[np.int64]]]:
    rejects = Reading()
    tokenizer.tokenizer.encode_special_tokens = True  # "</s>" in a text is four characters, not the end of it
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.path).name) or "source"
    prefixes = {split: folder / f"{number:02d}-{slug}.{split}" for split in ("train", "held-out")}
    counts = [np.zeros(target.model.vocab_size, np.int64) for _ in prefixes]
    size = sum(path.stat().st_size for path in source_files(source))
    done = 0
    with (
        TokenWriter(prefixes["train"], target.model.vocab_size) as train,
        TokenWriter(prefixes["held-out"], target.model.vocab_size) as held_out,
    ):
        for batch in _batches(_split(documents(source, rejects), target)):
            encoded = tokenizer.tokenizer.encode_batch_fast([d.text for d, _ in batch], add_special_tokens=False)
            for writer, tally, wanted in ((train, counts[0], False), (held_out, counts[1], True)):
                ids = [
                    np.array([*encoding.ids, tokenizer.eos], dtype=np.int64)
                    for encoding, (_, held) in zip(encoded, batch, strict=True)
                    if held == wanted
                ]
                writer.add(ids)
                if ids:
                    tally += np.bincount(np.concatenate(ids), minlength=len(tally))
            done += sum(len(d.text.encode()) for d, _ in batch)
            say(f"tokenising {source.path}", done, size)
    if train.tokens == 0 or held_out.tokens == 0:
        held = ", ".join(rejects.names[:3])
        raise UserError(
            "is an empty corpus: no text to train on and to hold out" + (f" ({held})" if held else ""),
            file=source_root(source),
            remedy="name files that hold more text",
        )
    entry = {
        "documents": len(train.lengths) + len(held_out.lengths),
        "tokens": train.tokens + held_out.tokens,
        "bytes": done,
        "rejects": dict(rejects.reasons),
        "rejected": rejects.names,
    }
    for split, writer in (("train", train), ("held_out", held_out)):
        entry[split] = {
            "prefix": writer.prefix.name,
            "documents": [0, len(writer.lengths)],
            "tokens": writer.tokens,
        }
    return entry, counts


def _split(found: Iterator[Document], target: Target) -> Iterator[tuple[Document, bool]]:
    """Documents with whether each is held out; a lone document is cut, its last lines are held out. When the hashes
    would hold out none, or all, the first document goes to the side that would be empty."""
    first = next(found, None)
    if first is None:
        return
    second = next(found, None)
    if second is None:
        yield from _cut(first, target.data.held_out)
        return
    sides = set()
    for document in itertools.chain([second], found):
        sides.add(side := _is_held_out(document, target))
        yield document, side
    yield first, _is_held_out(first, target) if len(sides) == 2 else not sides.pop()


def _cut(document: Document, fraction: float) -> Iterator[tuple[Document, bool]]:
    """A lone document in two, cut after a line near its end (or anywhere, when it is one line)."""
    text = document.text
    wanted = max(1, int(len(text) * (1 - fraction)))
    line = text.rfind("\n", 0, wanted) + 1
    cut = line if line > len(text) // 2 else wanted
    yield Document(document.name, text[:cut]), False
    if text[cut:]:
        yield Document(f"{document.name}#held-out", text[cut:]), True


def _batches(pairs: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    batch: list[tuple[Document, bool]] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[0].text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _take_tokens(source: Source, target: Target) -> tuple[dict[str, Any], list[NDArray[np.int64]]]:
    """A user's Megatron files as they are; the last documents, at least ``data.held_out`` of the tokens, held out."""
    prefix = Path(source.path).absolute()
    file = TokenFile(prefix)
    if len(file) < 2:
        raise UserError("needs two documents or more, to hold one out", file=prefix, remedy="tokenise more documents")
    total = len(file.tokens)
    first_held = int(np.searchsorted(file.document_starts, total * (1 - target.data.held_out), side="right")) - 1
    first_held = min(max(first_held, 1), len(file) - 1)
    border = int(file.document_starts[first_held])
    counts = [
        _count(file, 0, border, target.model.vocab_size),
        _count(file, border, total, target.model.vocab_size),
    ]
    entry = {
        "documents": len(file),
        "tokens": total,
        "bytes": suffixed(prefix, ".bin").stat().st_size,
        "rejects": {},
        "rejected": [],
        "train": {"prefix": str(prefix), "documents": [0, first_held], "tokens": border},
        "held_out": {"prefix": str(prefix), "documents": [first_held, len(file)], "tokens": total - border},
        "sha256": {suffix: sha256_file(suffixed(prefix, suffix)) for suffix in (".bin", ".idx")},
    }
    return entry, counts


def _count(file: TokenFile, first: int, last: int, vocab_size: int) -> NDArray[np.int64]:
    counts = np.zeros(vocab_size, np.int64)
    for start in range(first, last, _SCAN):
        piece = file.tokens[start : min(start + _SCAN, last)].astype(np.int64)
        if piece.min() < 0 or piece.max() >= vocab_size:
            raise UserError(
                "holds a token that model.vocab_size excludes",
                file=suffixed(file.prefix, ".bin"),
                value=int(piece.max() if piece.max() >= vocab_size else piece.min()),
                remedy=f"set model.vocab_size (now {vocab_size}) to the tokenizer's",
            )
        counts += np.bincount(piece, minlength=vocab_size)
    return counts
