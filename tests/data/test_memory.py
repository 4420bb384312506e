"""A corpus larger than the memory that a build may use."""

import json
import tracemalloc

from forgetrain.data import build, tokenise
from forgetrain.data.build import build_data
from tests.corpus import WORDS, corpus_target, write_corpus


def write_lines(path, size):
    text = " ".join(WORDS[number % len(WORDS)] for number in range(400))
    with path.open("w") as file:
        number = 0
        while file.tell() < size:
            file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
            number += 1


def with_tokenizer(tmp_path, size):
    """A target of ``size`` bytes of JSON lines whose tokenizer is there already."""
    write_corpus(tmp_path / "corpus")
    build_data(corpus_target(tmp_path / "corpus"), tmp_path / "first")
    write_lines(tmp_path / "large.jsonl", size)
    sources = [{"path": str(tmp_path / "large.jsonl")}]
    return corpus_target(tmp_path, data={"sources": sources, "tokenizer": str(tmp_path / "first" / "tokenizer")})


def test_a_build_holds_far_less_than_its_corpus(tmp_path, monkeypatch):
    """Neither the texts nor the tokens nor the lengths are kept: what Python and numpy hold is a few batches."""
    monkeypatch.setattr(tokenise, "BATCH", 2**16)
    monkeypatch.setattr(build, "_SCAN", 2**14)
    monkeypatch.setattr(tokenise, "SMALL", 1)
    target = with_tokenizer(tmp_path, 4 * 2**20)
    tracemalloc.start()
    try:
        data = build_data(target, tmp_path / "data", workers=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    tokens = sum(split.stat().st_size for split in (tmp_path / "data").glob("*.bin"))
    assert data.manifest["sources"][0]["bytes"] > 3.5 * 2**20
    assert peak < min(tokens, 1.5 * 2**20), f"{peak:,} bytes at {tokens:,} bytes of tokens"
