"""Products by cuBLAS. A weight is [O, I], as Hugging Face stores it; accumulation is fp32, and rounds once.

    forward    y [T, O] = x [T, I] · weightᵀ
    backward   d_x = alpha * d_y · weight            grad [O, I] (fp32) += alpha * d_yᵀ · x

The weight's gradient is accumulated inside the product, which reads and writes the fp32 buffer itself. alpha carries
a constant that scales the branch (muP), which so costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_forward(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.t())


def linear_input_grad(d_y: Tensor, weight: Tensor, alpha: float = 1.0) -> Tensor:
    if alpha == 1.0:
        return torch.mm(d_y, weight)
    d_x = torch.empty(d_y.shape[0], weight.shape[1], dtype=d_y.dtype, device=d_y.device)
    return torch.addmm(d_x, d_y, weight, beta=0.0, alpha=alpha, out=d_x)


def linear_weight_grad_(grad: Tensor, d_y: Tensor, x: Tensor, alpha: float = 1.0) -> None:
    """Adds alpha * d_yᵀ · x to grad."""
    if x.dtype == torch.float32:
        torch.addmm(grad, d_y.t(), x, alpha=alpha, out=grad)
    else:
        torch.addmm(grad, d_y.t(), x, out_dtype=torch.float32, alpha=alpha, out=grad)
