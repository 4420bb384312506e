"""Muon (Keller Jordan 2024, kellerjordan.github.io/posts/muon; arXiv 2502.16982), in place on one fp32 matrix [A, B].

    m ← μ m + (1 - μ) g          u = (1 - μ) g + μ m          p ← p - lr · wd · p - lr · 0.2 sqrt(max(A, B)) · NS(u)

NS: X = u / ‖u‖, then five times X ← a X + (b G + c G²) X with G = X Xᵀ, which brings the singular values near 1. With
0.2 sqrt(max(A, B)) an update's RMS is about AdamW's, so both optimizers share one learning rate and one decay.

forward(p, g, m, lr, momentum, weight_decay) -> None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetrain.ops.variant import Variant


def muon_textbook_forward(p: Tensor, g: Tensor, m: Tensor, lr: float, momentum: float, decay: float) -> None:
    m.mul_(momentum).add_(g, alpha=1 - momentum)
    x = g * (1 - momentum) + m * momentum
    wide = p.shape[0] <= p.shape[1]
    x = (x if wide else x.t()) / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.t()
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    rate = lr * 0.2 * max(p.shape) ** 0.5
    p.sub_(rate * (x if wide else x.t()) + lr * decay * p)


def muon_torch_forward(p: Tensor, g: Tensor, m: Tensor, lr: float, momentum: float, decay: float) -> None:
    """torch.optim.Muon's order of operations (adjust_lr_fn match_rms_adamw), with its iteration in bf16."""
    m.lerp_(g, 1 - momentum)
    x = g.lerp(m, momentum).bfloat16()
    tall = p.shape[0] > p.shape[1]
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    p.mul_(1 - lr * decay)
    p.add_(x.T if tall else x, alpha=-lr * (0.2 * max(p.shape) ** 0.5))


VARIANTS = {
    "textbook": Variant(muon_textbook_forward, None, "the formula as printed, in fp32"),
    "torch": Variant(muon_torch_forward, None, "torch.optim.Muon, which transformers' reference steps with: bf16"),
}
