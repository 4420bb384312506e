"""RMSNorm (arXiv 1910.07467): y = x / sqrt(mean(x²) + eps) · weight, over the last dimension.

forward(x, weight, eps) -> y in x's dtype, statistics in fp32; backward(saved, d_out, d_residual) -> (d_x, d_weight),
where d_residual, if given, is the gradient that reaches x past the norm, and is part of d_x: autograd adds the
gradients of x one by one as they come, so the sum is not always d_residual plus what the norm contributes.

x is [..., W], weight [W]; the same variants serve hidden states [T, D] and, as QK-norm, heads [N, S, H, K].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from forgetrain.ops.variant import Variant


def rmsnorm_textbook_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple]:
    wide = x.float()
    inverse = 1.0 / torch.sqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(x.dtype), (x, weight, inverse)


def rmsnorm_textbook_backward(saved: tuple, d_out: Tensor, d_residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, weight, inverse = saved
    normed, d_wide = x.float() * inverse, d_out.float()
    d_weight = (d_wide * normed).reshape(-1, weight.shape[0]).sum(0)
    d_normed = d_wide * weight.float()
    d_x = inverse * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))
    d_x = d_x.to(x.dtype)
    return d_x if d_residual is None else d_residual + d_x, d_weight.to(weight.dtype)


def record_beside_residual(norm: Callable, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple]:
    """Records the norm and, after it, the path past it, so that the backward pass adds their gradients as autograd."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        out = norm(x, weight)
        residual = x.view_as(x)
    return out.detach(), (out, residual, x, weight)


def pull_beside_residual(saved: tuple, d_out: Tensor, d_residual: Tensor | None) -> tuple[Tensor, ...]:
    out, residual, x, weight = saved
    if d_residual is None:
        return torch.autograd.grad(out, (x, weight), d_out)
    return torch.autograd.grad((out, residual), (x, weight), (d_out, d_residual))


def rmsnorm_torch_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple]:
    return record_beside_residual(lambda x, w: F.rms_norm(x, w.shape, w, eps), x, weight)


def rmsnorm_torch_backward(saved: tuple, d_out: Tensor, d_residual: Tensor | None = None) -> tuple[Tensor, ...]:
    return pull_beside_residual(saved, d_out, d_residual)


def rmsnorm_hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rounds to the weight's dtype before it multiplies by the weight, where F.rms_norm rounds after."""
    wide = x.to(torch.float32)
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + eps)).to(x.dtype)


def rmsnorm_hf_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, tuple]:
    return record_beside_residual(lambda x, w: rmsnorm_hf(x, w, eps), x, weight)


def rmsnorm_hf_backward(saved: tuple, d_out: Tensor, d_residual: Tensor | None = None) -> tuple[Tensor, ...]:
    return pull_beside_residual(saved, d_out, d_residual)


VARIANTS = {
    "textbook": Variant(rmsnorm_textbook_forward, rmsnorm_textbook_backward, "the formula in fp32, rounded once"),
    "torch": Variant(rmsnorm_torch_forward, rmsnorm_torch_backward, "F.rms_norm, as Megatron's local layers"),
    "hf": Variant(rmsnorm_hf_forward, rmsnorm_hf_backward, "transformers' order: rounded before the weight"),
}
