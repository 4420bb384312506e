"""Element-wise regions of the production schedule: each reads its inputs once and writes its outputs once when
torch.compile turns it into one loop, as the written engine has it do. Arithmetic is fp32, rounded once at the end.

Formulas: RMSNorm arXiv 1910.07467, RoPE arXiv 2104.09864, SwiGLU arXiv 2002.05202; see the modules of those ops.
Shapes: T tokens, D hidden_size, F intermediate_size, N rows, S positions, G key/value heads, R query heads of each,
K head_dim, V vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_region(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x_TD -> RMSNorm(x)_TD in x's dtype and the inverse root mean square, fp32 [T, 1]."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(x.dtype), inverse


def residual_norm_region(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x_TD + scale · branch_TD, rounded, then its RMSNorm: -> (sum_TD, normed_TD, inverse fp32 [T, 1])."""
    total = (x.float() + branch.float() * scale).to(x.dtype)
    wide = total.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return total, (wide * inverse * weight.float()).to(x.dtype), inverse


def norm_backward_region(
    x: Tensor, inverse: Tensor, weight: Tensor, d_out: Tensor, d_residual: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient through a norm of x_TD plus the one that passes it by: -> (d_x_TD, d_weight_D fp32)."""
    normed, d_wide = x.float() * inverse, d_out.float()
    d_normed = d_wide * weight.float()
    d_x = d_residual.float() + inverse * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return d_x.to(x.dtype), (d_wide * normed).sum(0)


def transposed_region(x: Tensor) -> Tensor:
    """x_TD -> x_DT."""
    return x.t().contiguous()


def swiglu_region(gate_up: Tensor) -> Tensor:
    """[gate, up]_T2F -> silu(gate) · up, [T, F]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def swiglu_backward_region(gate_up: Tensor, d_out: Tensor) -> Tensor:
    """-> [d_gate, d_up]_T2F."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid, d_wide = torch.sigmoid(gate), d_out.float()
    d_gate, d_up = d_wide * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), d_wide * gate * sigmoid
    # rounded before they are joined: the other way about, the compiler writes and reads an fp32 tensor between
    return torch.cat((d_gate.to(gate_up.dtype), d_up.to(gate_up.dtype)), dim=-1)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x_...K turned by the angles whose cosines and sines are given, in fp32; -sin turns back."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope_region(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q_NSGRK turned and scaled, k_NSGK turned, v_NSGK: -> q_NGSRK, k_NGSK, v_NGSK, as attention reads them. cos and
    sin are [N, S, K], the same in both halves."""
    half = q.shape[-1] // 2
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    q_turned = (turned(q, cos[:, :, None], sin[:, :, None]) * scale).to(q.dtype)
    k_turned = turned(k, cos, sin).to(k.dtype)
    return q_turned.transpose(1, 2).contiguous(), k_turned.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def rope_backward_region(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """d_q_NGSRK, d_k_NGSK and d_v_NGSK (the last two in fp32), turned back by the same angles: -> the gradient of the
    columns [Q, K, V], [N · S, (R + 2) · G · K], in d_q's dtype."""
    n, _, s, _, size = d_q.shape
    cos, sin = cos[:, :, None, : size // 2], sin[:, :, None, : size // 2]
    q_back = turned(d_q.transpose(1, 2), cos[:, :, None], -sin[:, :, None]) * scale
    k_back = turned(d_k.transpose(1, 2), cos, -sin)
    parts = [part.to(d_q.dtype).reshape(n * s, -1) for part in (q_back, k_back, d_v.transpose(1, 2))]
    return torch.cat(parts, dim=-1)


def head_norm_region(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """QK-norm: RMSNorm of each head of x_NS...K over K -> (normed, inverse fp32 [N, S, ..., 1])."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(x.dtype), inverse


def head_norm_backward_region(x: Tensor, inverse: Tensor, weight: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """-> (d_x_NSGRK, d_weight_K fp32)."""
    normed, d_wide = x.float() * inverse, d_out.float()
    d_normed = d_wide * weight.float()
    d_x = inverse * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return d_x.to(x.dtype), (d_wide * normed).flatten(0, -2).sum(0)


def entropy_region(logits: Tensor, labels: Tensor, d_nll: Tensor) -> Tensor:
    """Cross-entropy of logits_TV, which its gradient then replaces: -> nll_T fp32. A label's own logit is a sum, for
    torch 2.11's compiler would gather it after the gradient is in its place."""
    wide = logits.float()
    log_sum = torch.logsumexp(wide, dim=-1)
    onehot = torch.arange(logits.shape[1], device=logits.device)[None] == labels[:, None]
    nll = log_sum - torch.where(onehot, wide, 0.0).sum(-1)
    logits.copy_((torch.exp(wide - log_sum[:, None]) - onehot.float()) * d_nll[:, None])
    return nll


def vocabulary_sums_region(logits: Tensor, labels: Tensor, top: Tensor) -> Tensor:
    """Cross-entropy's sums over one rank's part of the vocabulary, fp32 [2, T]: exp(logit - top), and the label's own
    logit - top. labels: -1 where the label is in another part; top_T fp32: the largest logit of all parts."""
    shifted = logits.float() - top[:, None]
    own = shifted.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.stack((torch.exp(shifted).sum(-1), torch.where(labels >= 0, own, 0.0)))


def vocabulary_gradient_region(logits: Tensor, labels: Tensor, log_sum: Tensor, d_nll: Tensor) -> None:
    """Replaces one part of the logits by cross-entropy's gradient; log_sum_T fp32 is over all parts."""
    onehot = torch.arange(logits.shape[1], device=logits.device)[None] == labels[:, None]
    logits.copy_((torch.exp(logits.float() - log_sum[:, None]) - onehot.float()) * d_nll[:, None])


def adamw_region(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    rounded: Tensor | None,
    factor: Tensor,
    rates: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW (arXiv 1711.05101) with clipping's factor, in place over flat fp32 buffers, in one pass; ``rounded``
    receives the new weights in the dtype that products read. rates: fp32 [3], since they change from step to step:
    lr / (1 - beta1^t), sqrt(1 - beta2^t) and 1 - lr · decay."""
    grad = g * factor
    m_new = m + (grad - m) * (1 - beta1)
    v_new = v * beta2 + grad * grad * (1 - beta2)
    p_new = p * rates[2] - rates[0] * m_new / (v_new.sqrt() / rates[1] + eps)
    m.copy_(m_new)
    v.copy_(v_new)
    p.copy_(p_new)
    if rounded is not None:
        rounded.copy_(p_new)
