"""Attention where ranks share the positions of a row: each has the queries of two of 2C equal chunks, and the keys of
all, as Llama 3 was trained (arXiv 2407.21783, section 3.3.2).

Of C ranks, rank c has the chunks c and 2C - 1 - c: a late chunk sees as many keys more as the early one sees fewer, so
all ranks form the same number of scores. Shapes as in ``forgetrain.ops.regions``; S are all positions of a row,
P = S / C those of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def own_positions(s: int, ranks: int, rank: int) -> Tensor:
    """int64 [P], the positions of a rank. Raises ValueError when 2 · ``ranks`` does not divide ``s``."""
    if s % (2 * ranks):
        raise ValueError(f"rows of {s} positions do not divide into {2 * ranks} chunks, two of each of {ranks} ranks")
    chunks = torch.arange(s).chunk(2 * ranks)
    return torch.cat((chunks[rank], chunks[-1 - rank]))


def joined_positions(parts: Tensor) -> Tensor:
    """What each rank has of its positions, [C, ..., P, K] -> [..., S, K] in the order of positions."""
    early, late = parts.chunk(2, dim=-2)
    return torch.cat((*early, *late.flip(0)), dim=-2)


def parted_positions(whole: Tensor, ranks: int) -> Tensor:
    """[..., S, K] -> [C, ..., P, K], the other way."""
    chunks = whole.chunk(2 * ranks, dim=-2)
    return torch.stack([torch.cat((chunks[rank], chunks[-1 - rank]), dim=-2) for rank in range(ranks)])


def query_blocks(p: int, starts: tuple[int, int], block: int) -> Iterator[tuple[int, int, int]]:
    """(index of the first query, its position in the row, queries) of each block of a rank's two chunks, which begin
    at the positions ``starts``."""
    for chunk, start in enumerate(starts):
        for at in range(0, p // 2, block):
            yield chunk * (p // 2) + at, start + at, min(block, p // 2 - at)


def visible_probabilities(q: Tensor, k: Tensor, first: Tensor | None, r: int) -> Tensor:
    """The probabilities of a block's queries, [N · G, block · R, K], whose last is at the position of the last key of
    [N · G, keys, K]. first: int64 [N, block], the first key of its row that each query sees; None: all."""
    scores = torch.bmm(q, k.transpose(1, 2))
    size, end = scores.shape[1] // r, scores.shape[2]
    late = torch.full((size, size), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    scores[:, :, end - size :].add_(late.repeat_interleave(r, 0))
    if first is not None:
        hidden = torch.arange(end, device=scores.device) < first[:, :, None]
        scores.view(first.shape[0], -1, size, r, end).masked_fill_(hidden[:, None, :, None], float("-inf"))
    return torch.softmax(scores, dim=-1)


def attention_context_forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, starts: tuple[int, int], block: int
) -> Tensor:
    """Causal attention of a rank's q_NGPRK (already scaled) with k_NGSK and v_NGSK, ``block`` queries at a time: ->
    out_NGPRK. Nothing is kept: the backward pass forms the probabilities anew, for they are N · H · P · S / 2 numbers.
    first: int64 [N, P] (document masks), or None."""
    n, groups, p, r, d = q.shape
    q, k, v = q.view(n * groups, p * r, d), k.view(n * groups, -1, d), v.view(n * groups, -1, d)
    out = torch.empty_like(q)
    for own, start, size in query_blocks(p, starts, block):
        rows, end = slice(own * r, (own + size) * r), start + size
        seen = None if first is None else first[:, own : own + size]
        out[:, rows] = torch.bmm(visible_probabilities(q[:, rows], k[:, :end], seen, r), v[:, :end])
    return out.view(n, groups, p, r, d)


def attention_context_backward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, starts: tuple[int, int], d_out: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_q_NGPRK in q's dtype; this rank's share of d_k_NGSK and d_v_NGSK in fp32, as they are summed over blocks
    and ranks."""
    n, groups, p, r, d = q.shape
    q, d_out = q.view(n * groups, p * r, d), d_out.view(n * groups, p * r, d)
    k, v = k.view(n * groups, -1, d), v.view(n * groups, -1, d)
    d_q = torch.empty_like(q)
    d_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    d_v = torch.zeros_like(d_k)
    for own, start, size in query_blocks(p, starts, block):
        rows, end = slice(own * r, (own + size) * r), start + size
        seen = None if first is None else first[:, own : own + size]
        probabilities = visible_probabilities(q[:, rows], k[:, :end], seen, r)
        d_v[:, :end] += torch.bmm(probabilities.transpose(1, 2), d_out[:, rows])
        d_p = torch.bmm(d_out[:, rows], v[:, :end].transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(d_p, probabilities, -1, probabilities.dtype)
        d_q[:, rows] = torch.bmm(d_scores, k[:, :end])
        d_k[:, :end] += torch.bmm(d_scores.transpose(1, 2), q[:, rows])
    s = k.shape[1]
    return d_q.view(n, groups, p, r, d), d_k.view(n, groups, s, d), d_v.view(n, groups, s, d)
