"""Bad data, as the shipped command answers it: one line that names it, exit code 2, nothing left behind or lost."""

import errno
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from forgetrain.cli import main as command_line
from forgetrain.data.build import build_data
from forgetrain.data.folder import open_data
from forgetrain.data.indexed import TokenWriter, suffixed
from forgetrain.data.loader import Loader
from forgetrain.errors import UserError
from tests.corpus import VOCAB, corpus_target, write_corpus
from tests.data.test_inspect import target_file


@pytest.fixture
def theirs(tmp_path):
    """A Megatron pair and a tokenizer, as a user brings them."""
    target = corpus_target(write_corpus(tmp_path / "corpus"))
    build_data(target, tmp_path / "first")
    draw = np.random.default_rng(0)
    with TokenWriter(tmp_path / "theirs", VOCAB) as writer:
        writer.add([np.append(draw.integers(5, VOCAB, 30), 1) for _ in range(40)])
    return tmp_path / "theirs"


def target_of(tmp_path, source, **sections):
    data = {"sources": [{"path": str(source)}], "tokenizer": str(tmp_path / "first" / "tokenizer")}
    return corpus_target(tmp_path, **{**sections, "data": {**data, **sections.get("data", {})}})


def forgetrain(monkeypatch, capsys, *arguments):
    """Exit code and the lines on stderr of the command itself."""
    monkeypatch.setattr(sys, "argv", ["forgetrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    return ended.value.code, capsys.readouterr().err.splitlines()


def answer(tmp_path, monkeypatch, capsys, target, command="build", *options):
    file = target_file(tmp_path, target)
    code, lines = forgetrain(monkeypatch, capsys, "data", command, file, "--runs", tmp_path / "runs", *options)
    assert code == 2
    assert len(lines) == 1
    assert not (tmp_path / "runs" / target.name / "data").exists()
    return lines[0]


def test_a_pair_is_read_where_it_lies(theirs, tmp_path):
    before = {end: suffixed(theirs, end).stat().st_mtime_ns for end in (".bin", ".idx")}
    target = target_of(tmp_path, theirs)
    data = build_data(target, tmp_path / "data")
    raw = np.fromfile(suffixed(theirs, ".bin"), np.uint16)
    train, held_out = data.sources[0].train.tokens, data.sources[0].held_out.tokens
    assert np.array_equal(np.concatenate([train, held_out]), raw)
    batch = Loader(data, target).batch_at(0)
    window = int(Loader(data, target).places(0).window[0]) * target.recipe.sequence_length
    assert batch.tokens[0].tolist() == raw[window : window + target.recipe.sequence_length].tolist()
    assert {end: suffixed(theirs, end).stat().st_mtime_ns for end in before} == before
    assert not list((tmp_path / "data").glob("*.bin"))


DAMAGES = {
    "cut.bin": (".bin", lambda raw: raw[:-6], r"theirs\.bin: is truncated or damaged: 2474 bytes where .* says 2480"),
    "cut.idx": (".idx", lambda raw: raw[:-6], r"theirs\.idx: is truncated: \d+ bytes of \d+"),
    "no index": (".idx", lambda raw: b"junk" + raw, r"theirs\.idx: is not a Megatron index of whole numbers"),
    "no bin": (".bin", None, r"theirs\.bin: no such token file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_unreadable_shard_is_named(theirs, tmp_path, monkeypatch, capsys, name):
    suffix, damage, message = DAMAGES[name]
    path = suffixed(theirs, suffix)
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    assert re.search(message, answer(tmp_path, monkeypatch, capsys, target_of(tmp_path, theirs)))


def test_a_shard_damaged_after_it_was_built_is_named(theirs, tmp_path):
    target = target_of(tmp_path, theirs)
    build_data(target, tmp_path / "data")
    path = suffixed(theirs, ".bin")
    raw = bytearray(path.read_bytes())
    raw[8] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"theirs\.bin: is damaged: its SHA-256 is not the manifest's"):
        open_data(tmp_path / "data", target)


def test_the_name_of_one_file_of_a_pair_is_answered_with_the_prefix(theirs, tmp_path, monkeypatch, capsys):
    target = target_of(tmp_path, suffixed(theirs, ".bin"))
    line = answer(tmp_path, monkeypatch, capsys, target)
    assert f"Name the pair by its prefix, {theirs}" in line


@pytest.mark.parametrize("token", [VOCAB, -1])
def test_a_token_the_vocabulary_excludes_is_named(theirs, tmp_path, monkeypatch, capsys, token):
    with TokenWriter(theirs, 10**6) as writer:  # int32, so that it may be negative
        writer.add([np.array([5, 1]), np.array([token, 1]), np.array([6, 1])])
    line = answer(tmp_path, monkeypatch, capsys, target_of(tmp_path, theirs))
    assert f"theirs.bin: holds a token that model.vocab_size excludes (got {token}). Set model.vocab_size" in line


@pytest.mark.parametrize("where", ["recipe", "stages"])
def test_a_sequence_longer_than_the_positions_is_named(tmp_path, monkeypatch, capsys, where):
    write_corpus(tmp_path / "corpus")
    file = target_file(tmp_path, corpus_target(tmp_path / "corpus"))
    options = ["--set", "recipe.sequence_length=128"]
    if where == "stages":
        with file.open("a") as out:
            out.write('stages = [{ name = "long", steps = 20, sequence_length = 128 }]\n')
        options = ["--set", "recipe.steps=20"]
    code, lines = forgetrain(monkeypatch, capsys, "data", "build", file, "--runs", tmp_path / "runs", *options)
    assert (code, len(lines)) == (2, 1)
    assert re.search("sequence_length = 128,? (which )?exceeds model.max_position_embeddings = 64", lines[0])
    assert not (tmp_path / "runs").exists()


EMPTY = {
    "an empty folder": (lambda path: path.mkdir(), "is an empty corpus: no file matches"),
    "an empty file": (lambda path: path.write_text(""), r"source: is an empty corpus: .*\(source: empty\)"),
    "a blank file": (lambda path: path.write_text(" \n\n"), r"source: is an empty corpus: .*\(source: empty\)"),
    "a binary file": (lambda path: path.write_bytes(b"\x7fELF\0\0"), r"source: is binary, not UTF-8 text"),
    "another encoding": (lambda path: path.write_bytes("é".encode("latin-1")), r"source: is binary, not UTF-8 text"),
    "nothing there": (lambda path: None, r"data\.sources: no such file or folder"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_or_binary_source_is_named(tmp_path, monkeypatch, capsys, name):
    make, message = EMPTY[name]
    make(tmp_path / "source")
    assert re.search(message, answer(tmp_path, monkeypatch, capsys, corpus_target(tmp_path / "source")))


def test_a_folder_of_nothing_but_binaries_is_named_with_them(tmp_path, monkeypatch, capsys):
    (tmp_path / "source").mkdir()
    for number in range(5):
        (tmp_path / "source" / f"{number}.bin").write_bytes(b"\0")
    line = answer(tmp_path, monkeypatch, capsys, corpus_target(tmp_path / "source"))
    assert "source: is an empty corpus" in line
    assert "(0.bin: not UTF-8 text, 1.bin: not UTF-8 text, 2.bin: not UTF-8 text)" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', "a.jsonl:2 holds int under 'text', not text"),
        ('{"text": "a"}\n{"text"\n', "line 2 is no JSON"),
        ('{"text": null}\n{"text": null}\n', "(a.jsonl:1: null under 'text', a.jsonl:2: null under 'text')"),
    ],
)
def test_records_that_cannot_be_read_are_named_by_their_line(tmp_path, monkeypatch, capsys, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    assert message in answer(tmp_path, monkeypatch, capsys, corpus_target(tmp_path / "a.jsonl"))


def test_nothing_built_is_lost_to_bad_data(tmp_path, monkeypatch, capsys):
    write_corpus(tmp_path / "corpus")
    target = corpus_target(tmp_path / "corpus")
    before = build_data(target, tmp_path / "runs" / target.name / "data").sha256
    (tmp_path / "corpus" / "999.jsonl").write_text("no json\n")
    code, lines = forgetrain(
        monkeypatch, capsys, "data", "build", target_file(tmp_path, target), "--runs", tmp_path / "runs"
    )
    assert (code, len(lines)) == (2, 1)
    assert "999.jsonl: line 1 is no JSON" in lines[0]
    manifest = json.loads((tmp_path / "runs" / target.name / "data" / "manifest.json").read_text())
    assert manifest["sources"][0]["documents"] == 60
    (tmp_path / "corpus" / "999.jsonl").unlink()
    assert build_data(target, tmp_path / "runs" / target.name / "data").sha256 == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": ""}, "data.sources.0.path: String should have at least 1 character"),
        ({"path": ".", "glob": "*.nothing"}, "is an empty corpus: no file matches glob = '*.nothing'"),
        ({"glob": ""}, "data.sources.0.glob: String should have at least 1 character"),
        ({"glob": "/abs/*"}, "corpus: data.sources.glob: is no pattern (Non-relative patterns are unsupported)"),
        ({"split": "train"}, "corpus: data.sources.split: is of a data set, and this is none (got 'train')"),
        ({"config": "en"}, "config is of a data set of the hub, and"),
        ({"revision": "main"}, "revision is of a data set of the hub, and"),
        ({"path": "hf:"}, "path = 'hf:' names no data set; write hf:org/name"),
        ({"path": "hf:org/name", "glob": "*.txt"}, "glob is of a folder, and hf:org/name is on the hub; leave it out"),
    ],
)
def test_a_source_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, capsys, source, message):
    target = corpus_target(write_corpus(tmp_path / "corpus"))
    sources = [{"path": str(tmp_path / "corpus")} | source]
    options = ["--set", f"data.sources={toml_of(sources)}"]
    assert message in answer(tmp_path, monkeypatch, capsys, target, "build", *options)


def toml_of(sources):
    return "[" + ", ".join("{" + ", ".join(f'{k} = "{v}"' for k, v in source.items()) + "}" for source in sources) + "]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources=[]", "data.sources: List should have at least 1 item"),
        ("data.tokenizer=", "data.tokenizer: holds no tokenizer.json. Name a folder with one"),
        ("data.tokenizer={corpus}", "corpus: data.tokenizer: holds no tokenizer.json. Name a folder with one"),
    ],
)
def test_nothing_to_build_from_is_refused(tmp_path, monkeypatch, capsys, override, message):
    target = corpus_target(write_corpus(tmp_path / "corpus"))
    option = override.format(corpus=tmp_path / "corpus")
    assert message in answer(tmp_path, monkeypatch, capsys, target, "build", "--set", option)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EROFS, "read-only file system. Name a place that can be written, for example with --runs"),
     (errno.EACCES, "permission denied. Change its permissions, or name another place")],
)  # fmt: skip
def test_a_place_that_the_system_refuses_is_named(tmp_path, monkeypatch, capsys, number, remedy):
    def refuse(self, *arguments, **options):
        raise OSError(number, "refused", str(self))

    target = corpus_target(write_corpus(tmp_path / "corpus"))
    file = target_file(tmp_path, target)
    monkeypatch.setattr(Path, "mkdir", refuse)
    code, lines = forgetrain(monkeypatch, capsys, "data", "build", file, "--runs", tmp_path / "runs")
    assert code == 2
    assert len(lines) == 1
    assert f"{tmp_path / 'runs'}" in lines[0]
    assert lines[0].endswith(remedy)


def test_runs_that_is_a_file_is_named(tmp_path, monkeypatch, capsys):
    file = target_file(tmp_path, corpus_target(write_corpus(tmp_path / "corpus")))
    for command in (["data", "build"], ["train"]):
        code, lines = forgetrain(monkeypatch, capsys, *command, file, "--runs", file)
        assert code == 2
        assert lines[0].endswith("not a directory. Name another place: a part of this path is a file")
        assert len(lines) == 1


def test_a_folder_within_a_source_that_cannot_be_listed_is_no_smaller_corpus(tmp_path, monkeypatch, capsys):
    target = corpus_target(write_corpus(tmp_path / "corpus"))
    closed = tmp_path / "corpus" / "closed"
    write_corpus(closed)
    scan = os.scandir

    def refuse(path="."):
        if str(path) == str(closed):  # as for anyone but root, who may read everything
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"{closed}: permission denied. " in answer(tmp_path, monkeypatch, capsys, target)
