"""Attention of a part of the positions, rank by rank in one process, against that of whole rows."""

import pytest
import torch

from forgetrain.ops.blocked import attention_blocked_backward, attention_blocked_forward
from forgetrain.ops.context import (
    attention_context_backward,
    attention_context_forward,
    joined_positions,
    own_positions,
    parted_positions,
    query_blocks,
)

N, G, S, R, K = 2, 2, 48, 3, 8


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("ranks", "block"), [(2, 5), (4, 32)])
def test_the_parts_are_the_whole(ranks, block, masked):
    generator = torch.Generator().manual_seed(0)
    q, d_out = (torch.randn(N, G, S, R, K, generator=generator) for _ in range(2))
    k, v = (torch.randn(N, G, S, K, generator=generator) for _ in range(2))
    first = allowed = None
    if masked:  # documents that begin in the middle of a chunk, another in each row
        place = torch.arange(S)
        first = torch.stack([torch.where(place >= cut, cut, 0) for cut in (5, 29)])
        allowed = (place[None, None] >= first[:, :, None]) & torch.ones(S, S, dtype=torch.bool).tril()
    whole, probabilities = attention_blocked_forward(q, k, v, allowed, 16)
    due = attention_blocked_backward(q, k, v, probabilities, d_out, 16)

    chunk, outs, d_qs, d_ks, d_vs = S // (2 * ranks), [], [], 0.0, 0.0
    for rank in range(ranks):
        own = own_positions(S, ranks, rank)
        starts = (rank * chunk, (2 * ranks - 1 - rank) * chunk)
        assert own.tolist() == [place for start in starts for place in range(start, start + chunk)]
        seen = None if first is None else first[:, own]
        part, d_part = q[:, :, own].contiguous(), d_out[:, :, own].contiguous()
        outs.append(attention_context_forward(part, k, v, seen, starts, block))
        d_q, d_k, d_v = attention_context_backward(part, k, v, seen, starts, d_part, block)
        d_qs.append(d_q)
        d_ks, d_vs = d_ks + d_k, d_vs + d_v
    order = torch.cat([own_positions(S, ranks, rank) for rank in range(ranks)]).argsort()
    torch.testing.assert_close(torch.cat(outs, dim=2)[:, :, order], whole)
    torch.testing.assert_close(torch.cat(d_qs, dim=2)[:, :, order], due[0])
    torch.testing.assert_close(d_ks, due[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_vs, due[2], rtol=1e-5, atol=1e-5)


def test_positions_go_to_their_ranks_and_back():
    whole = torch.randn(2, N, G, S, K)
    parts = parted_positions(whole, 3)
    for rank in range(3):
        assert torch.equal(parts[rank], whole[..., own_positions(S, 3, rank), :])
    assert torch.equal(joined_positions(parts), whole)


def test_every_rank_forms_as_many_scores():
    p, ranks = 16, 4
    starts = [(rank * p // 2, (2 * ranks - 1 - rank) * p // 2) for rank in range(ranks)]
    scores = [sum(size * (start + size) for _, start, size in query_blocks(p, pair, 4)) for pair in starts]
    assert len(set(scores)) == 1


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="rows of 18 positions do not divide into 4 chunks"):
        own_positions(18, 2, 0)
