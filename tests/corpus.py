"""A small deterministic corpus, and the data folder of a tiny target built from it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from forgetrain.data.build import build_data
from forgetrain.data.folder import DataFolder
from forgetrain.spec.target import Target
from tests.tiny import tiny_target

WORDS = [
    "the",
    "forge",
    "trains",
    "one",
    "small",
    "model",
    "on",
    "plain",
    "text",
    "1",
    "22",
    "333",
    "4444",
    "and",
    "it",
]
VOCAB = 320


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """Text files of 20 to 120 words each."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for number in range(documents):
        text = " ".join(draw.choices(WORDS, k=draw.randint(20, 120)))
        (folder / f"{number:03d}.txt").write_text(text + "\n")
    return folder


def corpus_target(folder: Path, architecture: str = "minicpm5", **sections: dict[str, Any]) -> Target:
    """A tiny target whose data is ``folder``; ``sections`` as in ``tiny_target``."""
    data = {"sources": [{"path": str(folder)}], "held_out": 0.1}
    return tiny_target(
        architecture,
        **{
            **sections,
            "model": {"vocab_size": VOCAB, **sections.get("model", {})},
            "data": {**data, **sections.get("data", {})},
        },
    )


def built(runs: Path, architecture: str = "minicpm5", **sections: dict[str, Any]) -> tuple[Target, DataFolder]:
    """A target with its corpus and its data folder under ``runs``."""
    target = corpus_target(write_corpus(runs / "corpus"), architecture, **sections)
    return target, build_data(target, runs / target.name / "data")
