"""A built data folder: its manifest, checked, and its sources opened.

data = open_data(Path("runs/nano-cpu/data"), target)
data.sources[0].train.tokens, data.manifest["unigram_loss"]["held_out"]
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forgetrain.data.indexed import TokenFile, suffixed
from forgetrain.data.order import mixing_version
from forgetrain.data.tokenizer import TokenizerFolder, open_tokenizer
from forgetrain.durable import read_json, sha256_file
from forgetrain.errors import UserError
from forgetrain.spec.target import Target

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Split:
    """A run of whole documents of a token file: tokens [T], document_starts int64 [documents + 1], relative to it."""

    tokens: NDArray[Any]
    document_starts: NDArray[np.int64]


@dataclass(frozen=True)
class SourceData:
    name: str  # what the target calls it, which no other source is called
    weight: float
    train: Split
    held_out: Split


@dataclass(frozen=True)
class DataFolder:
    folder: Path
    manifest: dict[str, Any]
    tokenizer: TokenizerFolder
    sources: list[SourceData]

    @property
    def sha256(self) -> str:
        """What identifies the tokens and their order: SHA-256 of the manifest's hashes, sources and weights, and of the
        version of the mixing where these weights' is not the first, so that no checkpoint goes on in another order."""
        facts = [self.manifest[key] for key in ("files", "sources", "tokenizer")]
        if (version := mixing_version([source.weight for source in self.sources])) > 1:
            facts.append({"mixing": version})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def open_data(folder: Path, target: Target, *, verify: bool = True) -> DataFolder:
    """Opens what ``build_data`` wrote, for a target.

    ``verify`` compares the SHA-256 of every file (about a second for each gigabyte); sizes are compared always.

    Raises:
        UserError: nothing there, a file that is missing, truncated or damaged, or data made for another vocabulary,
            from other sources, or with other settings than the target's.
    """
    require_names_apart(target)
    build = "run forgetrain data build TARGET"
    manifest = read_json(folder / MANIFEST, f"{build} first")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError("is of another version of the program", file=folder / MANIFEST, remedy=f"{build} --force")
    if manifest["vocab_size"] != target.model.vocab_size:
        raise UserError(
            f"was built for a vocabulary of {manifest['vocab_size']}",
            file=folder,
            key="model.vocab_size",
            value=target.model.vocab_size,
            remedy=f"{build} --force",
        )
    # folders of earlier versions hold no settings
    paths_alone = {"sources": [{"path": entry["path"]} for entry in manifest["sources"]]}
    _require_same(manifest.get("settings", paths_alone), settings_of(target), folder, build)
    for name, facts in manifest["files"].items():
        _check(folder / name, facts["sha256"] if verify else None, facts["bytes"], f"{build} --force")
    sources = []
    for entry, source in zip(manifest["sources"], target.data.sources, strict=True):
        for suffix, sha256 in entry.get("sha256", {}).items():
            _check(
                suffixed(Path(entry["train"]["prefix"]), suffix), sha256 if verify else None, None, f"{build} --force"
            )
        splits = [_open_split(folder, entry[split]) for split in ("train", "held_out")]
        sources.append(SourceData(source.label, entry["weight"], *splits))
    return DataFolder(folder, manifest, open_tokenizer(folder / TOKENIZER, target.model), sources)


def require_names_apart(target: Target) -> None:
    """Raises UserError when two sources are called the same: losses and statistics are of a source by its name."""
    labels = [source.label for source in target.data.sources]
    for number, label in enumerate(labels):
        if (first := labels.index(label)) < number:
            raise UserError(
                f"{label!r} is what data.sources.{first} is called, too",
                key=f"data.sources.{number}.name",
                remedy="give each of them a name of its own",
            )


def settings_of(target: Target) -> dict[str, Any]:
    """What a target says of its data as far as building goes: the loader sees to names, stages and documents' masks."""
    left_out = {"stages": True, "documents": True, "sources": {"__all__": {"name"}}}
    return target.data.model_dump(mode="json", exclude=left_out)


def _require_same(built: dict[str, Any], asked: dict[str, Any], folder: Path, remedy: str) -> None:
    paths, wanted = ([source["path"] for source in settings["sources"]] for settings in (built, asked))
    if paths != wanted:
        raise UserError(
            f"was built from {', '.join(map(repr, paths))}",
            file=folder,
            key="data.sources",
            value=", ".join(wanted),
            remedy=remedy,
        )
    pairs = [("data", built, asked)]
    pairs += [
        (f"data.sources.{n}", *pair) for n, pair in enumerate(zip(built["sources"], asked["sources"], strict=True))
    ]
    for place, was, now in pairs:
        for key in (key for key in now if key in was and key != "sources" and now[key] != was[key]):
            raise UserError(
                f"was built with {was[key]!r}", file=folder, key=f"{place}.{key}", value=now[key], remedy=remedy
            )


def _check(path: Path, sha256: str | None, size: int | None, remedy: str) -> None:
    if not path.is_file():
        raise UserError("is missing", file=path, remedy=remedy)
    if size is not None and path.stat().st_size != size:
        raise UserError(f"is truncated or damaged: {path.stat().st_size} bytes of {size}", file=path, remedy=remedy)
    if sha256 is not None and sha256_file(path) != sha256:
        raise UserError("is damaged: its SHA-256 is not the manifest's", file=path, remedy=remedy)


def _open_split(folder: Path, entry: dict[str, Any]) -> Split:
    file = TokenFile(folder / entry["prefix"])  # an absolute prefix replaces the folder
    first, last = entry["documents"]
    starts = file.document_starts[first : last + 1]
    return Split(file.tokens[starts[0] : starts[-1]], starts - starts[0])
