"""Ops of the production schedule that go through their work in blocks, so that less exists at a time.

Shapes as in ``forgetrain.ops.regions``; grouped queries need no expansion, since the R query heads of a key head are
rows of the same product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_blocked_forward(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, block: int
) -> tuple[Tensor, list[Tensor]]:
    """Causal attention of q_NGSRK (already scaled), k_NGSK and v_NGSK, ``block`` query positions at a time.

    Each block multiplies with the keys up to its own end alone, so about half of the square is never formed. Returns
    out_NGSRK and the probabilities of each block, [N · G, block · R, keys], which the backward pass reads:
    N · H · S² / 2 numbers. ``allowed`` is bool [N, S, S] (document masks), or None for plain causal attention.
    """
    (n, groups, s, r, d), dtype = q.shape, q.dtype
    q, k, v = q.view(n * groups, s * r, d), k.view(n * groups, s, d), v.view(n * groups, s, d)
    out, probabilities = torch.empty_like(q), []
    late = torch.full((block, block), float("-inf"), dtype=dtype, device=q.device).triu(1).repeat_interleave(r, 0)
    for start in range(0, s, block):
        end = min(start + block, s)
        rows = slice(start * r, end * r)
        scores = torch.bmm(q[:, rows], k[:, :end].transpose(1, 2))
        if allowed is None:
            scores[:, :, start:].add_(late[: (end - start) * r, : end - start])
        else:
            hidden = ~allowed[:, None, start:end, None, :end]
            scores.view(n, groups, end - start, r, end).masked_fill_(hidden, float("-inf"))
        p = torch.softmax(scores, dim=-1)
        out[:, rows] = torch.bmm(p, v[:, :end])
        probabilities.append(p)
    return out.view(n, groups, s, r, d), probabilities


def attention_blocked_backward(
    q: Tensor, k: Tensor, v: Tensor, probabilities: list[Tensor], d_out: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> d_q_NGSRK in q's dtype; d_k_NGSK and d_v_NGSK in fp32, as they are summed over blocks."""
    n, groups, s, r, d = q.shape
    q, d_out = q.view(n * groups, s * r, d), d_out.view(n * groups, s * r, d)
    k, v = k.view(n * groups, s, d), v.view(n * groups, s, d)
    d_q = torch.empty_like(q)
    d_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    d_v = torch.zeros_like(d_k)
    for start, p in zip(range(0, s, block), probabilities, strict=True):
        end = min(start + block, s)
        rows = slice(start * r, end * r)
        d_v[:, :end] += torch.bmm(p.transpose(1, 2), d_out[:, rows])
        d_p = torch.bmm(d_out[:, rows], v[:, :end].transpose(1, 2))
        d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
        d_q[:, rows] = torch.bmm(d_scores, k[:, :end])
        d_k[:, :end] += torch.bmm(d_scores.transpose(1, 2), q[:, rows])
    return d_q.view(n, groups, s, r, d), d_k.view(n, groups, s, d), d_v.view(n, groups, s, d)


def norm_blocked(flat: Tensor, block: int = 4096) -> Tensor:
    """‖flat‖₂ as the norm of its blocks' norms, fp32 []: one fp32 sum over 10⁷ numbers would lose digits."""
    whole = flat.numel() // block * block
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, block), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return torch.linalg.vector_norm(torch.cat((blocks, rest[None])))
