import struct

import numpy as np
import pytest

from forgetrain.data import indexed
from forgetrain.data.indexed import TokenFile, TokenWriter, suffixed
from forgetrain.errors import UserError

DOCUMENTS = [np.array([5, 7, 1]), np.array([9, 1]), np.array([4, 4, 4, 4, 1])]


@pytest.fixture
def prefix(tmp_path):
    path = tmp_path / "some.corpus"
    with TokenWriter(path, vocab_size=100) as writer:
        writer.add(DOCUMENTS[:2])
        writer.add(DOCUMENTS[2:])
    return path


def test_round_trip(prefix):
    file = TokenFile(prefix)
    assert file.tokens.tolist() == [5, 7, 1, 9, 1, 4, 4, 4, 4, 1]
    assert file.document_starts.tolist() == [0, 3, 5, 10]
    assert file.dtype == np.uint16
    assert len(file) == 3


@pytest.mark.parametrize("vocab_size", [100, 130_560])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_megatron_core_reads_it(tmp_path, vocab_size):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    path = tmp_path / "corpus"
    with TokenWriter(path, vocab_size) as writer:
        writer.add(DOCUMENTS)
    dataset = indexed_dataset.IndexedDataset(str(path))
    assert len(dataset) == 3
    for ours, theirs in zip(DOCUMENTS, dataset, strict=True):
        assert theirs.tolist() == ours.tolist()
        assert theirs.dtype == indexed_dataset.DType.optimal_dtype(vocab_size)
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]
    assert dataset.sequence_lengths.tolist() == [3, 2, 5]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_reads_what_megatron_core_writes(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    path = tmp_path / "theirs"
    builder = indexed_dataset.IndexedDatasetBuilder(str(path) + ".bin", dtype=np.int32)
    builder.add_document(torch.tensor([3, 4, 5, 6]), [2, 2])  # a document of two sequences
    builder.add_document(torch.tensor([7]), [1])
    builder.finalize(str(path) + ".idx")
    file = TokenFile(path)
    assert file.tokens.tolist() == [3, 4, 5, 6, 7]
    assert file.document_starts.tolist() == [0, 4, 5]


def test_truncated_tokens_are_refused(prefix):
    path = suffixed(prefix, ".bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"some\.corpus\.bin: is truncated or damaged: 18 bytes .* 20"):
        TokenFile(prefix)


def test_a_truncated_index_is_refused(prefix):
    path = suffixed(prefix, ".idx")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"\.idx: is truncated"):
        TokenFile(prefix)


@pytest.mark.parametrize("content", [b"", b"MMIDIDX", b"\x00" * 40])
def test_what_is_no_index_is_refused(prefix, content):
    suffixed(prefix, ".idx").write_bytes(content)
    with pytest.raises(UserError, match="not a Megatron index"):
        TokenFile(prefix)


def test_an_index_of_floats_is_refused(prefix):
    path = suffixed(prefix, ".idx")
    raw = bytearray(path.read_bytes())
    raw[17:18] = struct.pack("B", 7)
    path.write_bytes(raw)
    with pytest.raises(UserError, match="whole numbers"):
        TokenFile(prefix)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.bin: no such token file"):
        TokenFile(tmp_path / "nothing")


def test_what_was_synced_is_gone_on_from(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with TokenWriter(whole, 100) as writer:
        writer.add(DOCUMENTS)
    writer = TokenWriter(cut, 100)
    writer.add(DOCUMENTS[:1])
    writer.sync()
    tokens, documents = writer.tokens, writer.documents
    writer.add([np.array([8] * 1000)])
    writer.sync()  # more than the caller knows of
    with TokenWriter(cut, 100, tokens=tokens, documents=documents) as again:
        again.add(DOCUMENTS[1:])
    for suffix in (".bin", ".idx"):
        assert suffixed(cut, suffix).read_bytes() == suffixed(whole, suffix).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.bin", "cut.idx", "whole.bin", "whole.idx"]


def test_less_than_was_synced_is_refused(tmp_path):
    writer = TokenWriter(tmp_path / "cut", 100)
    writer.add(DOCUMENTS)
    writer.sync()
    with pytest.raises(UserError, match=r"cut\.bin: is truncated: 20 bytes of 22\. .*--force"):
        TokenWriter(tmp_path / "cut", 100, tokens=11, documents=3)


def test_the_last_document_can_be_taken_out_again(tmp_path):
    with TokenWriter(tmp_path / "a", 100) as writer:
        writer.add(DOCUMENTS)
        assert writer.take_last().tolist() == DOCUMENTS[2].tolist()
        writer.add([np.array([2, 1])])
        assert writer.take_last().tolist() == [2, 1]
    file = TokenFile(tmp_path / "a")
    assert file.tokens.tolist() == [5, 7, 1, 9, 1]
    assert file.document_starts.tolist() == [0, 3, 5]


def test_an_index_of_more_documents_than_fit_in_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_PIECE", 8)
    lengths = [3, 1, 4, 1, 5]
    with TokenWriter(tmp_path / "a", 100) as writer:
        writer.extend(np.arange(14), np.array(lengths))
    assert np.diff(TokenFile(tmp_path / "a").document_starts).tolist() == lengths
