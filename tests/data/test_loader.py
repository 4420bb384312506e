import numpy as np
import pytest
import torch

from forgetrain.data.loader import Loader
from forgetrain.errors import UserError
from tests.corpus import built

EPOCH = 40


@pytest.fixture
def pair(tmp_path):
    return built(tmp_path)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_batch_has_the_contracts_shapes(pair):
    target, data = pair
    batch = Loader(data, target).batch_at(0)
    n, s = target.recipe.batch_size, target.recipe.sequence_length
    assert batch.tokens.shape == batch.labels.shape == batch.mask.shape == (n, s)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.cu_seqlens.shape == (n * s + 1,)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[: n + 1].tolist() == [row * s for row in range(n + 1)]
    assert batch.loss_denominator == n * s
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


def test_an_epoch_reads_every_window_once(pair):
    target, data = pair
    loader = Loader(data, target)
    tokens, s = data.sources[0].train.tokens, target.recipe.sequence_length
    windows = {tuple(tokens[w * s : w * s + s].tolist()) for w in range(loader.windows[s])}
    steps = -(-loader.windows[s] // target.recipe.batch_size)
    seen = {tuple(row.tolist()) for step in range(steps) for row in loader.batch_at(step).tokens}
    assert seen == windows


def test_ranks_share_the_global_batch_in_order(pair):
    target, data = pair
    whole = Loader(data, target).batch_at(5)
    for world in (1, 2):
        parts = [Loader(data, target, rank=rank, world=world).batch_at(5) for rank in range(world)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert all(part.loss_denominator == whole.loss_denominator for part in parts)


def test_batches_are_those_of_batch_at_from_any_step(pair):
    target, data = pair
    loader = Loader(data, target)
    read = dict(loader.batches(3, 9))
    assert list(read) == list(range(3, 9))
    assert all(same(batch, loader.batch_at(step)) for step, batch in read.items())


def test_leaving_batches_early_ends_the_thread(pair):
    import threading

    target, data = pair
    for _ in Loader(data, target).batches(0, 10**9):
        break
    assert not [thread for thread in threading.enumerate() if thread.name == "forgetrain-loader"]


def test_an_error_in_the_thread_reaches_the_caller(pair, monkeypatch):
    target, data = pair
    loader = Loader(data, target)

    def broken(step):
        raise UserError("torn")

    monkeypatch.setattr(loader, "batch_at", broken)
    with pytest.raises(UserError, match="torn"):
        next(loader.batches(0, 5))


def test_documents_cut_cu_seqlens_and_the_loss(tmp_path):
    target, data = built(tmp_path, data={"documents": "mask+reset"})
    loader, eos = Loader(data, target), data.tokenizer.eos
    n, s = target.recipe.batch_size, target.recipe.sequence_length
    cuts = 0
    for step in range(EPOCH):
        batch = loader.batch_at(step)
        # a label is the first of a document when its token is the end of one
        assert torch.equal(batch.mask == 0, batch.tokens == eos)
        starts = {row * s for row in range(n)} | {
            row * s + column + 1 for row, column in (batch.tokens == eos).nonzero().tolist() if column + 1 < s
        }
        used = [*sorted(starts), n * s]
        assert batch.cu_seqlens[: len(used)].tolist() == used
        assert (batch.cu_seqlens[len(used) :] == n * s).all()
        assert batch.loss_denominator == batch.mask.sum()
        cuts += len(starts) - n
    assert cuts > 20


def test_the_denominator_is_global_when_documents_are_masked(tmp_path):
    target, data = built(tmp_path, data={"documents": "mask"})
    for step in range(8):
        parts = [Loader(data, target, rank=rank, world=2).batch_at(step) for rank in range(2)]
        assert parts[0].loss_denominator == parts[1].loss_denominator == sum(part.mask.sum() for part in parts)


@pytest.mark.parametrize("documents", ["ignore", "mask"])
def test_held_out_counts_every_token_once(tmp_path, documents):
    target, data = built(tmp_path, data={"documents": documents})
    held = data.sources[0].held_out
    counted = []
    for batch, weight in Loader(data, target).held_out():
        assert weight == batch.mask.sum() <= batch.loss_denominator
        counted += batch.labels[batch.mask > 0].tolist()
    expected = held.tokens[1:].tolist()
    if documents == "mask":
        inner = set((held.document_starts[1:-1] - 1).tolist())
        expected = [token for place, token in enumerate(expected) if place not in inner]
    assert counted == expected


def test_held_out_is_shared_among_ranks_and_limited(pair):
    target, data = pair
    whole = sum(weight for _, weight in Loader(data, target).held_out())
    ranks = [[weight for _, weight in Loader(data, target, rank=rank, world=2).held_out()] for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert sum(map(sum, ranks)) == whole
    limited = [weight for _, weight in Loader(data, target).held_out(limit=3)]
    assert limited == [3 * target.recipe.sequence_length]


def test_sources_are_mixed_by_weight(tmp_path):
    from tests.corpus import write_corpus

    other = write_corpus(tmp_path / "other", documents=10, seed=9)
    for path in other.iterdir():
        path.write_text("zebra " * 60)
    sources = [{"path": str(tmp_path / "corpus"), "weight": 3.0}, {"path": str(other), "weight": 1.0}]
    target, data = built(tmp_path, data={"sources": sources})
    loader = Loader(data, target)
    stripes = [bool(np.isin(row, data.sources[1].train.tokens[:6]).mean() > 0.9) for row in loader.batch_at(0).tokens]
    assert sum(stripes) == 1
    assert len(stripes) == 4


def test_too_little_text_is_refused(tmp_path):
    target, data = built(tmp_path)
    recipe = target.recipe.model_copy(update={"sequence_length": 10**6})
    with pytest.raises(UserError, match=r"recipe\.sequence_length: holds .* less than one window"):
        Loader(data, target.model_copy(update={"recipe": recipe}))


def test_a_batch_that_ranks_cannot_share_is_refused(pair):
    target, data = pair
    with pytest.raises(UserError, match=r"recipe\.batch_size: does not divide into micro-batches of 2 on 3 ranks"):
        Loader(data, target, world=3)
