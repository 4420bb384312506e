"""``forgetrain data build``: sources to a folder of tokens, a tokenizer and a manifest.

    data = build_data(target, Path("runs/nano-cpu/data"))

The folder appears whole or not at all::

    manifest.json                      what it was made of, counts, SHA-256 of every file
    tokenizer/                         tokenizer.json, tokenizer_config.json
    00-python-stdlib.train.bin .idx    Megatron's format, every document ended by the end-of-document token
    00-python-stdlib.held-out.bin .idx

What a killed build did lies beside it in ``.data.building``, and the next one goes on with it. The same sources and
settings give the same bytes, however often a build was killed and however many processes tokenised.

Megatron files that the user names stay where they are; their last documents are held out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgetrain.data.corpus import STDLIB, source_files
from forgetrain.data.folder import FORMAT, MANIFEST, TOKENIZER, DataFolder, open_data, require_names_apart, settings_of
from forgetrain.data.indexed import TokenFile, suffixed, token_dtype
from forgetrain.data.tokenise import Report, require_text, tokenise, training_texts, write_indices
from forgetrain.data.tokenizer import (
    BOS,
    EOS,
    TokenizerFolder,
    copy_tokenizer,
    open_tokenizer,
    save_trained,
    train_tokenizer,
)
from forgetrain.data.unfinished import Unfinished, unfinished
from forgetrain.data.worker import Settings
from forgetrain.durable import sha256_file, write_json
from forgetrain.errors import UserError
from forgetrain.spec.target import Source, Target

#: A tokenizer is trained on at most this much text of each source, its first.
TRAINED_ON = 128 * 2**20
_SCAN = 2**20


def build_data(
    target: Target, out: Path, *, force: bool = False, workers: int | None = None, report: Report | None = None
) -> DataFolder:
    """Builds the data of a target in ``out``; does nothing when ``out`` was built from the same sources and settings.

    workers: processes that tokenise; as many as this process has cores when None. force: builds from the beginning.

    Raises:
        UserError: two sources of one name, an empty corpus, a binary file, a tokenizer larger than the vocabulary, a
            truncated token file, a full disk, another process that builds there. ``out`` is then as it was.
    """
    say = report or (lambda what, done, total: None)
    require_names_apart(target)
    key = _inputs_key(target)
    if not force and _built_from(out) == key:
        return open_data(out, target)
    with unfinished(out, key, anew=force) as work:
        entries = {number: _take_tokens(source, target) for number, source in _token_files(target)}
        texts = {number: source for number, source in enumerate(target.data.sources) if number not in entries}
        if not work.saved:
            for source in texts.values():
                require_text(source)
        tokenizer = _make_tokenizer(target, work, list(texts.values()), say)
        settings = Settings(
            tokenizer=tokenizer.folder / "tokenizer.json",
            eos=tokenizer.eos,
            dtype=token_dtype(target.model.vocab_size).name,
            held_out=target.data.held_out,
        )
        sizes = [sum(path.stat().st_size for path in source_files(source)) for source in texts.values()]
        for place, (number, source) in enumerate(texts.items()):
            name = f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(source.path).name) or 'source'}"
            done = work.state.get("entries", {}).get(name)
            if done is None:
                count = workers or len(os.sched_getaffinity(0))
                overall = _overall(say, sizes, place)
                done = tokenise(source, name, settings, target.model.vocab_size, work, workers=count, say=overall)
            else:
                write_indices(work.folder, done, target.model.vocab_size)
            entries[number] = done
        say("counting and hashing", 0, 0)
        _write_manifest(target, key, work.folder, tokenizer, [entry for _, entry in sorted(entries.items())])
        work.finish()
    return open_data(out, target, verify=False)


def _built_from(out: Path) -> str | None:
    """The key of the folder that is there; None when there is none, or its manifest cannot be read."""
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest.get("key") if isinstance(manifest, dict) else None


def _overall(say: Report, sizes: list[int], place: int) -> Report:
    """Reports a source's bytes among those of all; in all are unknown where one source's are."""
    before, total = sum(sizes[:place]), sum(sizes) if all(sizes) else 0
    return lambda what, done, _: say(what, before + done, total)


def _write_manifest(
    target: Target, key: str, folder: Path, tokenizer: TokenizerFolder, entries: list[dict[str, Any]]
) -> None:
    sources = target.data.sources
    entries = [
        entry | {"path": source.path, "weight": source.weight} for entry, source in zip(entries, sources, strict=True)
    ]
    counts = [[_counts(folder, entry[split], target) for entry in entries] for split in ("train", "held_out")]
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "key": key,
            "target": target.name,
            "settings": settings_of(target),
            "vocab_size": target.model.vocab_size,
            "tokenizer": {
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "eos": tokenizer.eos,
                "bos": tokenizer.bos,
                "pad": tokenizer.pad,
            },
            "sources": entries,
            "unigram_loss": unigram_loss(counts[0], [source.weight for source in sources], counts[1]),
            "files": {
                path.relative_to(folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
                for path in sorted(folder.rglob("*"))
                if path.is_file() and path.name != MANIFEST
            },
        },
    )


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
    settings: list[Any] = [FORMAT, settings_of(target), model.vocab_size, model.max_position_embeddings]
    settings += [model.eos_token_id, model.bos_token_id, model.pad_token_id]
    for source in target.data.sources:
        if _is_token_file(source):
            files = [suffixed(Path(source.path), suffix) for suffix in (".bin", ".idx")]
            if not files[0].is_file():
                raise UserError("no such token file", file=files[0], remedy="fetch it, it goes with the .idx file")
        else:
            files = source_files(source)
        settings.append([[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    if target.data.tokenizer is not None:
        given = Path(target.data.tokenizer)
        file = given if given.is_file() else given / "tokenizer.json"
        settings.append(sha256_file(file) if file.is_file() else None)  # where there is none, copying it says so
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _is_token_file(source: Source) -> bool:
    return source.path != STDLIB and suffixed(Path(source.path), ".idx").is_file()


def _token_files(target: Target) -> list[tuple[int, Source]]:
    return [(number, source) for number, source in enumerate(target.data.sources) if _is_token_file(source)]


def _make_tokenizer(target: Target, work: Unfinished, sources: list[Source], say: Report) -> TokenizerFolder:
    """The tokenizer of an unfinished build, or the target's, or a new one, trained on the text of ``sources``."""
    folder = work.folder / TOKENIZER
    if work.saved:
        return open_tokenizer(folder, target.model)
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
            for text in training_texts(source, target.data.held_out):
                yield text
                taken += len(text)
                done += len(text)
                say("reading for the tokenizer", done, total)
                if taken >= TRAINED_ON:
                    break
        say("training the tokenizer", total, total)

    tokenizer = train_tokenizer(texts(), target.model.vocab_size)
    save_trained(tokenizer, folder, target.model)
    opened = open_tokenizer(folder, target.model)
    _require_ids(target, opened)
    if work.due():
        work.save()
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


def _take_tokens(source: Source, target: Target) -> dict[str, Any]:
    """A user's Megatron files as they are; the last documents, at least ``data.held_out`` of the tokens, held out."""
    prefix = Path(source.path).absolute()
    file = TokenFile(prefix)
    if len(file) < 2:
        raise UserError("needs two documents or more, to hold one out", file=prefix, remedy="tokenise more documents")
    total = len(file.tokens)
    first_held = int(np.searchsorted(file.document_starts, total * (1 - target.data.held_out), side="right")) - 1
    first_held = min(max(first_held, 1), len(file) - 1)
    border = int(file.document_starts[first_held])
    _require_within(file, target.model.vocab_size)
    return {
        "documents": len(file),
        "tokens": total,
        "bytes": suffixed(prefix, ".bin").stat().st_size,
        "rejects": {},
        "rejected": [],
        "train": {"prefix": str(prefix), "documents": [0, first_held], "tokens": border},
        "held_out": {"prefix": str(prefix), "documents": [first_held, len(file)], "tokens": total - border},
        "sha256": {suffix: sha256_file(suffixed(prefix, suffix)) for suffix in (".bin", ".idx")},
    }


def _require_within(file: TokenFile, vocab_size: int) -> None:
    for start in range(0, len(file.tokens), _SCAN):
        piece = file.tokens[start : start + _SCAN]
        low, high = int(piece.min()), int(piece.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                "holds a token that model.vocab_size excludes",
                file=suffixed(file.prefix, ".bin"),
                value=high if high >= vocab_size else low,
                remedy=f"set model.vocab_size (now {vocab_size}) to the tokenizer's",
            )


def _counts(folder: Path, split: dict[str, Any], target: Target) -> NDArray[np.int64]:
    """int64 [vocab_size]: how often each token is in a split."""
    file = TokenFile(folder / split["prefix"])  # an absolute prefix replaces the folder
    first, last = (int(file.document_starts[document]) for document in split["documents"])
    counts = np.zeros(target.model.vocab_size, np.int64)
    for start in range(first, last, _SCAN):
        counts += np.bincount(file.tokens[start : min(start + _SCAN, last)], minlength=len(counts))
    return counts
