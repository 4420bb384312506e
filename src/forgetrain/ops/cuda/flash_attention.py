"""Causal attention by FlashAttention-4 (the package flash-attn-4), whose kernels for Hopper are faster than cuDNN's.

Its two functions are called without its autograd: backward writes the gradients of queries, keys and values where
they lie in the gradient of qkv [T, (H + 2G) * K], so that nothing packs them later. It takes bf16, accumulates in
fp32, and adds up the gradient of a query in whatever order its blocks come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def flash_kernels() -> tuple[Callable, Callable]:
    """Forward and backward. Raises ImportError, with the remedy, where the package is missing."""
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # pyright: ignore
    except ImportError as error:
        raise ImportError(f"FlashAttention-4 is missing ({error}): pip install 'forgetrain[hopper]'") from error
    return _flash_attn_fwd, _flash_attn_bwd


def flash_attention_forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> tuple[Tensor, tuple]:
    """Returns the context [N, H, S, K], laid out [N, S, H, K] in memory as q is, and what backward needs.

    ``documents``: int32, ascending boundaries in the N * S tokens beyond which no token looks, also those of the rows.
    One that repeats is a document without tokens, so that their number can be fixed."""
    forward, _ = flash_kernels()
    rows, heads, length, width = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"softmax_scale": width**-0.5, "causal": True}
    if documents is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), length)
    # a block of several query heads is the faster for narrow heads, and the slower for wide ones
    out, lse = forward(q, k, v, return_lse=True, pack_gqa=width < 128, **options)[:2]
    return out.view(rows, length, heads, width).transpose(1, 2), (q, k, v, out, lse, options)


def flash_attention_backward(saved: tuple, d_out: Tensor) -> Tensor:
    """d_out [N, H, S, K], laid out as the context. Returns the gradient of qkv as RoPE left it, [T, (H + 2G) * K]."""
    _, backward = flash_kernels()
    q, k, v, out, lse, options = saved
    heads, groups, width = q.shape[-2], k.shape[-2], q.shape[-1]
    d_qkv = torch.empty(*q.shape[:-2], heads + 2 * groups, width, dtype=q.dtype, device=q.device)
    d_q, d_k, d_v = d_qkv.split([heads, groups, groups], dim=-2)
    backward(q, k, v, out, d_out.transpose(1, 2).reshape(out.shape), lse, dq=d_q, dk=d_k, dv=d_v, **options)
    return d_qkv.view(-1, (heads + 2 * groups) * width)
