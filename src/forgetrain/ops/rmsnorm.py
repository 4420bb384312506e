"""RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x²) + eps) · weight, over the last dimension.

forward(x, weight, eps) -> y in x's dtype, statistics in fp32; backward -> (d_x, d_weight). x is [..., W], weight [W];
the same variants serve hidden states [T, D] and, as QK-norm, heads [N, S, H, K].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from forgetrain.ops.variant import Variant
from forgetrain.ops.vjp import pull, record


def rmsnorm_textbook_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple]:
    wide = x.float()
    inverse = 1.0 / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(x.dtype), (x, weight, inverse)


def rmsnorm_textbook_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, Tensor]:
    x, weight, inverse = saved
    normed, d_wide = x.float() * inverse, d_out.float()
    d_weight = (d_wide * normed).reshape(-1, weight.shape[0]).sum(0)
    d_normed = d_wide * weight.float()
    d_x = inverse * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    return d_x.to(x.dtype), d_weight.to(weight.dtype)


def rmsnorm_torch_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple]:
    return record(lambda x, w: F.rms_norm(x, w.shape, w, eps), x, weight)


def rmsnorm_torch_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


def rmsnorm_hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounds to the weight's dtype before it multiplies by the weight, where F.rms_norm rounds after."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def rmsnorm_hf_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple]:
    return record(lambda x, w: rmsnorm_hf(x, w, eps), x, weight)


def rmsnorm_hf_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


VARIANTS = {
    "textbook": Variant(rmsnorm_textbook_forward, rmsnorm_textbook_backward, "the formula in fp32, rounded once"),
    "torch": Variant(rmsnorm_torch_forward, rmsnorm_torch_backward, "F.rms_norm, as Megatron's local layers"),
    "hf": Variant(rmsnorm_hf_forward, rmsnorm_hf_backward, "transformers' order: rounded before the weight"),
}
