"""AdamW (arXiv 1711.05101), in place on fp32 tensors.

    m ← β₁ m + (1 - β₁) g          v ← β₂ v + (1 - β₂) g²
    p ← p - lr · wd · p - lr · (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + eps)

forward(p, g, m, v, t: int from 1, lr, beta1, beta2, eps, weight_decay) -> None.
"""

# torch.optim and torch.nn.utils are made of the foreach functions, which torch does not list among its own
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import torch
from torch import Tensor

from forgetrain.ops.variant import Variant


def adamw_textbook_forward(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> None:
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).add_(g * g, alpha=1 - beta2)
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    p.sub_(lr * (m_hat / (v_hat.sqrt() + eps) + decay * p))


def adamw_torch_forward(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> None:
    """torch.optim.AdamW's order of operations, which Megatron uses too where Apex and Transformer Engine are absent."""
    p.mul_(1 - lr * decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    denominator = (v.sqrt() / correction2**0.5).add_(eps)
    p.addcdiv_(m, denominator, value=-(lr / correction1))


def adamw_foreach_forward(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, beta1: float, beta2: float, eps: float, decay: float
) -> None:
    """The same by torch's foreach kernels, torch.optim.AdamW's default on a GPU: they divide by a number, where the
    kernel for one tensor multiplies by its reciprocal."""
    torch._foreach_mul_([p], 1 - lr * decay)
    torch._foreach_lerp_([m], [g], 1 - beta1)
    torch._foreach_mul_([v], beta2)
    torch._foreach_addcmul_([v], [g], [g], 1 - beta2)
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    denominator = torch._foreach_sqrt([v])
    torch._foreach_div_(denominator, [correction2**0.5])
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_([p], [m], denominator, [-(lr / correction1)])


VARIANTS = {
    "textbook": Variant(adamw_textbook_forward, None, "the formula as printed"),
    "torch": Variant(adamw_torch_forward, None, "torch.optim.AdamW: lerp, addcmul, addcdiv"),
    "foreach": Variant(adamw_foreach_forward, None, "torch.optim.AdamW's foreach kernels, its default on a GPU"),
}
