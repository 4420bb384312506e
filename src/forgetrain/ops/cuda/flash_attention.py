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


def flash_attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple]:
    """Returns the context [N, H, S, K], laid out [N, S, H, K] in memory as q is, and what backward needs."""
    forward, _ = flash_kernels()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # a block of several query heads is the faster for narrow heads, and the slower for wide ones
    packed = q.shape[-1] < 128
    out, lse = forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=True, return_lse=True, pack_gqa=packed)[:2]
    return out.transpose(1, 2), (q, k, v, out, lse)


def flash_attention_backward(saved: tuple, d_out: Tensor) -> Tensor:
    """d_out [N, H, S, K], laid out as the context. Returns the gradient of qkv as RoPE left it, [T, (H + 2G) * K]."""
    _, backward = flash_kernels()
    q, k, v, out, lse = saved
    rows, length, heads, width = q.shape
    groups = k.shape[2]
    d_qkv = torch.empty(rows, length, heads + 2 * groups, width, dtype=q.dtype, device=q.device)
    d_q, d_k, d_v = d_qkv.split([heads, groups, groups], dim=2)
    scale = width**-0.5
    backward(q, k, v, out, d_out.transpose(1, 2), lse, softmax_scale=scale, causal=True, dq=d_q, dk=d_k, dv=d_v)
    return d_qkv.view(rows * length, -1)
