"""Causal attention through cuDNN, called by name: PyTorch's own choice on Hopper is FlashAttention-2, which is slower.

qkv is [T, (H + 2G) * K] as RoPE leaves it; queries, keys and values are views of it, and no head is copied. The
context is [T, H * K]. cuDNN takes bf16, accumulates in fp32 and keeps the rows' log-sum-exp for backward. In fp32,
which cuDNN does not have, and on a CPU, the formula softmax(q kᵀ / sqrt(K)) v is written out instead, in fp32, and
rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_heads(qkv: Tensor, rows: int, heads: int, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, H, S, K], k and v [N, G, S, K], as views of qkv."""
    packed = qkv.view(rows, -1, heads + 2 * groups, head_dim).transpose(1, 2)
    q, k, v = packed.split([heads, groups, groups], dim=1)
    return q, k, v


def cudnn_attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple]:
    """Returns the context [N, H, S, K], laid out [N, S, H, K] in memory as q is, and what backward needs."""
    out, lse, _, _, max_q, max_k, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=q.shape[-1] ** -0.5
    )
    return out, (q, k, v, out, lse, seed, offset, max_q, max_k)


def cudnn_attention_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, seed, offset, max_q, max_k = saved
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, lse, seed, offset, None, None, None, max_q, max_k, 0.0, True, scale=q.shape[-1] ** -0.5
    )


def exact_attention_forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> tuple[Tensor, tuple]:
    """``first``, int32 [N * S]: where in its row the document begins beyond which a token does not look back."""
    dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
    copies, length = q.shape[1] // k.shape[1], q.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if first is not None:
        hidden = hidden | (torch.arange(length, device=q.device) < first.view(-1, 1, length, 1))
    scores = (q @ k.repeat_interleave(copies, 1).mT) * q.shape[-1] ** -0.5
    p = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    out = (p @ v.repeat_interleave(copies, 1)).to(dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), (q, k, v, p)


def exact_attention_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, v, p), dtype, d_out = saved, d_out.dtype, d_out.float()
    copies = q.shape[1] // k.shape[1]
    d_v = p.mT @ d_out
    d_p = d_out @ v.repeat_interleave(copies, 1).mT
    d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    d_q = d_scores @ k.repeat_interleave(copies, 1)
    d_k = d_scores.mT @ q
    groups = (q.shape[0], k.shape[1], copies, *q.shape[2:])
    return d_q.to(dtype), d_k.reshape(groups).sum(2).to(dtype), d_v.reshape(groups).sum(2).to(dtype)
