"""Ops of the production schedule that go through their work in blocks which stay in a core's cache.

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
    out_NGSRK and the probabilities of each block, [block · R, keys], which the backward pass reads: N · H · S² / 2
    numbers. ``allowed`` is bool [N, S, S] (document masks), or None for plain causal attention.
    """
    n, groups, s, r, d = q.shape
    out, probabilities = torch.empty_like(q), []
    late = torch.full((block, block), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    late = late[:, None].expand(block, r, block).reshape(block * r, block)
    for row in range(n):
        for group in range(groups):
            for start in range(0, s, block):
                end = min(start + block, s)
                size = end - start
                scores = torch.mm(q[row, group, start:end].view(size * r, d), k[row, group, :end].t())
                if allowed is None:
                    scores[:, start:].add_(late[: size * r, :size])
                else:
                    hidden = ~allowed[row, start:end, None, :end].expand(size, r, end).reshape(size * r, end)
                    scores.masked_fill_(hidden, float("-inf"))
                p = torch.softmax(scores, dim=-1)
                torch.mm(p, v[row, group, :end], out=out[row, group, start:end].view(size * r, d))
                probabilities.append(p)
    return out, probabilities


def attention_blocked_backward(
    q: Tensor, k: Tensor, v: Tensor, probabilities: list[Tensor], d_out: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (d_q_NGSRK, d_k_NGSK, d_v_NGSK) in q's dtype; d_k and d_v are summed over blocks in fp32."""
    n, groups, s, r, d = q.shape
    d_q = torch.empty_like(q)
    d_k = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    d_v = torch.zeros_like(d_k)
    blocks = iter(probabilities)
    for row in range(n):
        for group in range(groups):
            for start in range(0, s, block):
                end = min(start + block, s)
                rows = (end - start) * r
                p, d_block = next(blocks), d_out[row, group, start:end].view(rows, d)
                d_v[row, group, :end] += torch.mm(p.t(), d_block)
                d_p = torch.mm(d_block, v[row, group, :end].t())
                d_scores = torch.ops.aten._softmax_backward_data(d_p, p, -1, p.dtype)
                torch.mm(d_scores, k[row, group, :end], out=d_q[row, group, start:end].view(rows, d))
                d_k[row, group, :end] += torch.mm(d_scores.t(), q[row, group, start:end].view(rows, d))
    return d_q, d_k.to(q.dtype), d_v.to(q.dtype)


def norm_blocked(flat: Tensor, block: int) -> Tensor:
    """‖flat‖₂ as the norm of its blocks' norms, fp32 []: one fp32 sum over 10⁷ numbers would lose digits."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in flat.split(block)]))


def adamw_blocked(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    factor: Tensor,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    block: int,
) -> None:
    """AdamW (arXiv 1711.05101) with clipping's factor, in place over flat fp32 buffers, ``block`` numbers at a time."""
    step, root = lr / (1 - beta1**t), (1 - beta2**t) ** 0.5
    for start in range(0, p.numel(), block):
        part = slice(start, start + block)
        grad = g[part] * factor
        m_part, v_part = m[part], v[part]
        m_part.lerp_(grad, 1 - beta1)
        v_part.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        p_part = p[part].mul_(1 - lr * decay)
        p_part.addcdiv_(m_part, (v_part.sqrt() / root).add_(eps), value=-step)
