import errno
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from forgetrain.data import indexed
from forgetrain.data.build import build_data, unigram_loss
from forgetrain.data.folder import open_data
from forgetrain.data.indexed import TokenWriter, suffixed
from forgetrain.errors import UserError
from tests.corpus import VOCAB, built, corpus_target, write_corpus


@pytest.fixture
def target(tmp_path):
    return corpus_target(write_corpus(tmp_path / "corpus"))


def test_documents_end_with_eos_and_all_are_there(target, tmp_path):
    data = build_data(target, tmp_path / "data")
    source, entry = data.sources[0], data.manifest["sources"][0]
    assert entry["documents"] == 60
    texts = []
    for split in (source.train, source.held_out):
        for start, end in zip(split.document_starts, split.document_starts[1:], strict=False):
            tokens = split.tokens[start:end].tolist()
            assert tokens[-1] == data.tokenizer.eos
            assert data.tokenizer.eos not in tokens[:-1]
            texts.append(data.tokenizer.tokenizer.decode(tokens[:-1]))
    assert sorted(texts) == sorted(path.read_text() for path in (tmp_path / "corpus").iterdir())
    assert entry["bytes"] == sum(path.stat().st_size for path in (tmp_path / "corpus").iterdir())


def test_building_again_gives_the_same_bytes(target, tmp_path):
    first = build_data(target, tmp_path / "one")
    second = build_data(target, tmp_path / "two", force=True)
    assert first.sha256 == second.sha256


def test_a_built_folder_is_kept_until_its_sources_change(target, tmp_path):
    build_data(target, tmp_path / "data")
    before = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    build_data(target, tmp_path / "data")
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == before
    (tmp_path / "corpus" / "999.txt").write_text("one more document of plain text")
    assert build_data(target, tmp_path / "data").manifest["sources"][0]["documents"] == 61


def test_a_document_stays_held_out_when_others_come_and_go(target, tmp_path):
    def held(folder):
        data = build_data(target, folder)
        split = data.sources[0].held_out
        bounds = zip(split.document_starts, split.document_starts[1:], strict=False)
        return {data.tokenizer.tokenizer.decode(split.tokens[a:b].tolist()) for a, b in bounds}

    before = held(tmp_path / "one")
    for number in range(30):
        (tmp_path / "corpus" / f"1{number:02d}.txt").write_text(f"another text number {number}")
    assert before <= held(tmp_path / "two")


def test_text_that_looks_like_a_special_token_is_text(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(4):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"a </s> in html <|im_end|> {number} " * 9)
    data = build_data(corpus_target(tmp_path / "corpus"), tmp_path / "data")
    for split in (data.sources[0].train, data.sources[0].held_out):
        assert (split.tokens == data.tokenizer.eos).sum() == len(split.document_starts) - 1
        assert not (split.tokens == data.tokenizer.im_end).any()


def test_a_lone_document_gives_its_last_lines(tmp_path):
    text = "".join(f"line {number} of the only text\n" for number in range(200))
    (tmp_path / "input.txt").write_text(text)
    data = build_data(corpus_target(tmp_path / "input.txt"), tmp_path / "data")
    decode = data.tokenizer.tokenizer.decode
    train, held = (decode(split.tokens[:-1].tolist()) for split in (data.sources[0].train, data.sources[0].held_out))
    assert train + held == text
    assert 0.08 < len(held) / len(text) < 0.13


def test_a_users_token_files_are_taken_as_they_are(tmp_path):
    write_corpus(tmp_path / "corpus")
    first = build_data(corpus_target(tmp_path / "corpus"), tmp_path / "first")
    prefix = tmp_path / "theirs"
    with TokenWriter(prefix, VOCAB) as writer:
        writer.add([np.array([5 + number % 9] * 20 + [1]) for number in range(50)])
    mixed = {
        "sources": [{"path": str(tmp_path / "corpus"), "weight": 3.0}, {"path": str(prefix)}],
        "tokenizer": str(tmp_path / "first" / "tokenizer"),
    }
    data = build_data(corpus_target(tmp_path / "corpus", data=mixed), tmp_path / "data")
    assert data.tokenizer.sha256 == first.tokenizer.sha256
    entry = data.manifest["sources"][1]
    assert entry["train"]["tokens"] + entry["held_out"]["tokens"] == 50 * 21
    assert entry["held_out"]["tokens"] >= 0.1 * 50 * 21
    assert data.sources[1].train.tokens[:3].tolist() == [5, 5, 5]


def test_token_files_need_their_tokenizer(tmp_path):
    with TokenWriter(tmp_path / "theirs", VOCAB) as writer:
        writer.add([np.array([5, 1])] * 3)
    with pytest.raises(UserError, match=r"data\.tokenizer: is not set"):
        build_data(corpus_target(tmp_path / "theirs"), tmp_path / "data")


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    build_data(corpus_target(write_corpus(tmp_path / "corpus")), tmp_path / "first")
    with TokenWriter(tmp_path / "theirs", 10_000) as writer:
        writer.add([np.array([5, 1]), np.array([VOCAB, 1]), np.array([6, 1])])
    sources = {"sources": [{"path": str(tmp_path / "theirs")}], "tokenizer": str(tmp_path / "first" / "tokenizer")}
    with pytest.raises(UserError, match=rf"theirs\.bin: holds a token that model.vocab_size excludes \(got {VOCAB}\)"):
        build_data(corpus_target(tmp_path, data=sources), tmp_path / "data")


def test_an_empty_corpus_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "blank.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"corpus: is an empty corpus.*blank\.txt: empty"):
        build_data(corpus_target(tmp_path / "corpus"), tmp_path / "runs" / "data")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    build_data(corpus_target(write_corpus(tmp_path / "corpus")), tmp_path / "data")
    small = corpus_target(
        tmp_path / "corpus", model={"vocab_size": 262}, data={"tokenizer": str(tmp_path / "data" / "tokenizer")}
    )
    with pytest.raises(UserError, match=r"model\.vocab_size: is smaller than the tokenizer's \d+ tokens"):
        build_data(small, tmp_path / "other")


def test_ids_that_differ_from_the_trained_tokenizers_are_refused(tmp_path):
    target = corpus_target(write_corpus(tmp_path / "corpus"), model={"eos_token_id": 2})
    with pytest.raises(UserError, match=r"model\.eos_token_id: is not </s>"):
        build_data(target, tmp_path / "data")


def test_a_full_disk_leaves_the_old_folder(target, tmp_path, monkeypatch):
    before = build_data(target, tmp_path / "data").sha256

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    original = TokenWriter.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        self._bin = Full(self._bin)

    monkeypatch.setattr(indexed.TokenWriter, "__init__", init)
    with pytest.raises(UserError, match=r"\.bin: cannot be written: no space left on device"):
        build_data(target, tmp_path / "data", force=True)
    assert open_data(tmp_path / "data", target).sha256 == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data"]


def test_a_real_file_size_limit_is_named_too(target, tmp_path):
    toml = tmp_path / "target.json"
    toml.write_text(json.dumps(target.plain()))
    code = (
        "import json, resource, sys; from pathlib import Path\n"
        "from forgetrain.data.build import build_data; from forgetrain.errors import UserError\n"
        "from forgetrain.spec.target import parse_target\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: build_data(parse_target(json.load(open(sys.argv[1]))), Path(sys.argv[2]))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(toml), str(tmp_path / "data")], capture_output=True, text=True, check=True
    )
    assert "cannot be written: file too large. Free some space" in done.stdout
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-2], "is truncated or damaged"),
        (lambda raw: raw[:9] + bytes([raw[9] ^ 1]) + raw[10:], "is damaged: its SHA-256 is not the manifest's"),
        (None, "is missing"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, damage, message):
    target, data = built(tmp_path)
    path = suffixed(data.folder / data.manifest["sources"][0]["train"]["prefix"], ".bin")
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"00-corpus\.train\.bin: {message}.*forgetrain data build"):
        open_data(data.folder, target)


def test_data_of_another_vocabulary_is_refused(tmp_path):
    target, data = built(tmp_path)
    other = target.model_copy(update={"model": target.model.model_copy(update={"vocab_size": 400})})
    with pytest.raises(UserError, match="was built for a vocabulary of 320"):
        open_data(data.folder, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0.2}, r"data\.held_out: was built with 0\.1 \(got 0\.2\)\. Run forgetrain data build TARGET"),
        ({"sources": [{"path": "x"}]}, r"data\.sources: was built from '.*corpus' \(got 'x'\)"),
        ({"sources": [{"weight": 2.0}]}, r"data\.sources\.0\.weight: was built with 1\.0 \(got 2\.0\)"),
        ({"sources": [{"glob": "0*.txt"}]}, r"data\.sources\.0\.glob: was built with '\*\*/\*' \(got '0\*\.txt'\)"),
        ({"tokenizer": "mine"}, r"data\.tokenizer: was built with None \(got 'mine'\)"),
    ],
)
def test_data_of_other_settings_than_the_targets_is_refused_until_it_is_built_again(tmp_path, changes, message):
    target, data = built(tmp_path)
    path = target.data.sources[0].path
    changes = changes | ({"sources": [{"path": path} | s for s in changes["sources"]]} if "sources" in changes else {})
    other = corpus_target(tmp_path / "corpus", data=changes)
    with pytest.raises(UserError, match=message):
        open_data(data.folder, other)


def test_what_the_loader_sees_to_needs_no_other_build(tmp_path):
    target, data = built(tmp_path)
    named = {"path": target.data.sources[0].path, "name": "web"}
    stages = [{"name": "all", "steps": target.recipe.steps, "weights": {"web": 1.0}}]
    other = corpus_target(tmp_path / "corpus", data={"sources": [named], "stages": stages, "documents": "mask"})
    assert open_data(data.folder, other).sha256 == data.sha256


@pytest.mark.parametrize("manifest", [None, "{", "[]"])
def test_building_for_another_vocabulary_or_over_a_damaged_manifest_needs_no_force(tmp_path, manifest):
    _, data = built(tmp_path)
    if manifest is not None:
        (data.folder / "manifest.json").write_text(manifest)
    other = corpus_target(tmp_path / "corpus", model={"vocab_size": VOCAB if manifest else 400})
    assert build_data(other, data.folder).manifest["vocab_size"] == other.model.vocab_size


def test_data_that_was_never_built_is_named(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file\. Run forgetrain data build TARGET first"):
        open_data(tmp_path / "data", corpus_target(tmp_path))


def test_unigram_loss_is_the_cross_entropy_of_the_counts():
    train, held = np.array([7, 1, 0]), np.array([3, 0, 1])
    p = np.array([8, 2, 1]) / 11
    assert unigram_loss([train], [1.0], [held])["held_out"] == pytest.approx(-(3 * np.log(p[0]) + np.log(p[2])) / 4)
    half = unigram_loss([train, np.array([0, 0, 10])], [1.0, 1.0], [held, held])["held_out"]
    q = (p + np.array([1, 1, 11]) / 13) / 2
    assert half == pytest.approx(-(3 * np.log(q[0]) + np.log(q[2])) / 4)


def test_ctrl_c_in_the_middle_leaves_the_old_folder(target, tmp_path, monkeypatch):
    before = build_data(target, tmp_path / "data").sha256

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(indexed.TokenWriter, "extend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_data(target, tmp_path / "data", force=True)
    assert open_data(tmp_path / "data", target).sha256 == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data"]


def test_two_sources_of_one_label_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "corpus").mkdir()  # empty: reading would refuse it for that
    twice = [{"path": str(tmp_path / "corpus"), "glob": glob} for glob in ("0*", "1*")]
    target = corpus_target(tmp_path / "corpus", data={"sources": twice})
    with pytest.raises(UserError, match=r"data\.sources\.1\.name: .*corpus.* is what data\.sources\.0 is called, too"):
        build_data(target, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_names_tell_sources_of_one_path_apart_and_are_theirs_in_what_is_shown(tmp_path):
    write_corpus(tmp_path / "corpus")
    twice = [{"path": str(tmp_path / "corpus"), "glob": f"0{n}*", "name": f"part {n}"} for n in (0, 1)]
    target = corpus_target(tmp_path / "corpus", data={"sources": twice})
    data = build_data(target, tmp_path / "data")
    assert [source.name for source in data.sources] == ["part 0", "part 1"]
    twice[1]["name"] = "part 0"  # a name changes no token, so the folder is not built again
    with pytest.raises(UserError, match=r"data\.sources\.1\.name: 'part 0' is what data\.sources\.0 is called, too"):
        open_data(tmp_path / "data", corpus_target(tmp_path / "corpus", data={"sources": twice}))


def test_an_order_of_another_version_is_of_other_data_and_of_that_alone(tmp_path):
    """Checkpoints record this hash, so the first version's are resumed where the order is still theirs."""
    write_corpus(tmp_path / "corpus")

    def hashes(*weights):
        path = str(tmp_path / "corpus")
        sources = [{"path": path, "glob": f"0{n}*", "name": str(n), "weight": w} for n, w in enumerate(weights)]
        data = build_data(corpus_target(tmp_path / "corpus", data={"sources": sources}), tmp_path / "data")
        facts = [data.manifest[key] for key in ("files", "sources", "tokenizer")]
        return data.sha256, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    now, first = hashes(3.0, 0.5)
    assert now == first
    now, first = hashes(0.0014, 0.0006)
    assert now != first
