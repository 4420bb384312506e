"""Causal attention with grouped queries: softmax(q kᵀ / sqrt(K) + mask) v, query head h reading key head h·G/H.

forward(q_NSHK, k_NSGK, v_NSGK, allowed) -> out_NSHK in q's dtype; backward -> (d_q, d_k, d_v), shaped as the inputs.
``allowed`` is bool [N, S, S], true where a query (row) may look at a key (column), causality included; None means
plain causal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from forgetrain.ops.variant import Variant
from forgetrain.ops.vjp import pull, record


def causal(q: Tensor) -> Tensor:
    """bool [1, S, S], true on and below the diagonal."""
    s = q.shape[1]
    return torch.ones(1, s, s, dtype=torch.bool, device=q.device).tril()


def attention_textbook_forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> tuple[Tensor, tuple]:
    groups = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5
    wide_q = q.float().transpose(1, 2)
    wide_k = k.float().transpose(1, 2).repeat_interleave(groups, 1)
    wide_v = v.float().transpose(1, 2).repeat_interleave(groups, 1)
    scores = (wide_q * scale) @ wide_k.transpose(2, 3)
    allowed = causal(q) if allowed is None else allowed
    probabilities = torch.softmax(scores.masked_fill(~allowed[:, None], float("-inf")), dim=-1)
    out = (probabilities @ wide_v).transpose(1, 2)
    return out.to(q.dtype), (wide_q, wide_k, wide_v, probabilities, groups, scale, q.dtype)


def attention_textbook_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, probabilities, groups, scale, dtype = saved
    d_out = d_out.float().transpose(1, 2)
    d_v = probabilities.transpose(2, 3) @ d_out
    d_probabilities = d_out @ v.transpose(2, 3)
    d_scores = probabilities * (d_probabilities - (d_probabilities * probabilities).sum(-1, keepdim=True)) * scale
    d_q, d_k = d_scores @ k, d_scores.transpose(2, 3) @ q
    d_k, d_v = (d.unflatten(1, (-1, groups)).sum(2) for d in (d_k, d_v))
    return tuple(d.transpose(1, 2).to(dtype) for d in (d_q, d_k, d_v))


def attention_eager(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """transformers' eager attention: scores in q's dtype, an additive mask, softmax in fp32 rounded to q's dtype."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if groups > 1:
        n, g, s, d = k.shape
        k = k[:, :, None].expand(n, g, groups, s, d).reshape(n, g * groups, s, d)
        v = v[:, :, None].expand(n, g, groups, s, d).reshape(n, g * groups, s, d)
    lowest = torch.finfo(q.dtype).min
    bias = torch.where(allowed[:, None], torch.zeros((), dtype=q.dtype, device=q.device), lowest)
    scores = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5) + bias
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(probabilities, v).transpose(1, 2).contiguous()


def attention_eager_forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> tuple[Tensor, tuple]:
    allowed = causal(q) if allowed is None else allowed
    return record(lambda q, k, v: attention_eager(q, k, v, allowed), q, k, v)


def attention_eager_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


def attention_megatron(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Megatron's local attention: sequence first, scaled inside the product, masked with -10000, softmax in fp32."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    s, n, h, d = q.shape
    groups = h // k.shape[2]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = (x.reshape(s, n * h, d) for x in (q, k, v))
    scores = torch.baddbmm(
        torch.empty(n * h, s, s, dtype=q.dtype, device=q.device),
        q.transpose(0, 1),
        k.transpose(0, 1).transpose(1, 2),
        beta=0.0,
        alpha=d**-0.5,
    )
    scores = scores.view(n, h, s, s)
    if q.dtype != torch.float32:
        scores = scores.float()
    probabilities = torch.softmax(scores.masked_fill(~allowed[:, None], -10000.0), dim=-1).to(q.dtype)
    out = torch.bmm(probabilities.view(n * h, s, s), v.transpose(0, 1))
    return out.view(n, h, s, d).permute(2, 0, 1, 3).contiguous().transpose(0, 1)


def attention_megatron_forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> tuple[Tensor, tuple]:
    allowed = causal(q) if allowed is None else allowed
    return record(lambda q, k, v: attention_megatron(q, k, v, allowed), q, k, v)


def attention_megatron_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, native: bool) -> Tensor:
    """torch's scaled_dot_product_attention; without ``native`` grouped keys and values are expanded first."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if groups > 1 and not native:
        n, g, s, d = k.shape
        k = k[:, :, None].expand(n, g, groups, s, d).reshape(n, g * groups, s, d)
        v = v[:, :, None].expand(n, g, groups, s, d).reshape(n, g * groups, s, d)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if allowed is None else allowed[:, None],
        is_causal=allowed is None,
        scale=q.shape[-1] ** -0.5,
        enable_gqa=native and groups > 1,
    )
    return out.transpose(1, 2).contiguous()


def attention_sdpa_forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> tuple[Tensor, tuple]:
    return record(lambda q, k, v: attention_sdpa(q, k, v, allowed, native=False), q, k, v)


def attention_sdpa_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


def attention_sdpa_gqa_forward(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> tuple[Tensor, tuple]:
    return record(lambda q, k, v: attention_sdpa(q, k, v, allowed, native=True), q, k, v)


def attention_sdpa_gqa_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


VARIANTS = {
    "textbook": Variant(attention_textbook_forward, attention_textbook_backward, "every product in fp32"),
    "eager": Variant(attention_eager_forward, attention_eager_backward, "transformers' eager attention"),
    "megatron": Variant(attention_megatron_forward, attention_megatron_backward, "Megatron's local attention"),
    "sdpa": Variant(attention_sdpa_forward, attention_sdpa_backward, "torch's SDPA, keys and values expanded"),
    "sdpa_gqa": Variant(attention_sdpa_gqa_forward, attention_sdpa_gqa_backward, "torch's SDPA with native GQA"),
}
