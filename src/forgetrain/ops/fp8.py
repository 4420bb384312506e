"""Linear with operands rounded to fp8: what an fp8 target's layers compute, in plain torch.

Of products of the layers alone: head and attention stay as they are. No plan names it: which precision a product has
follows from the target. Activations and weights are e4m3, gradients e5m2, each tensor scaled by the power of two that
puts its largest magnitude into the upper half of the type's range, (max / 2, max]; products of these numbers are fp32.
In fp32, the gates' exact mode, it is the textbook's linear. Signatures are those of ``linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetrain.ops.linear import linear_textbook_backward, linear_textbook_forward


def rounded_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """x's nearest numbers of an fp8 type, in fp32; NaN where anything in x is not finite."""
    top = torch.finfo(dtype).max
    most = x.abs().max().float().clamp(min=top * 2.0**-126)
    _, exponent = torch.frexp(top / most)
    scale = torch.exp2((exponent - 1).float())
    numbers = (x.float() * scale).to(dtype).float() / scale
    return torch.where(most.isfinite(), numbers, torch.nan)


def linear_fp8_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple]:
    if x.dtype == torch.float32:
        return linear_textbook_forward(x, weight, bias)
    numbers = rounded_to(torch.float8_e4m3fn, x), rounded_to(torch.float8_e4m3fn, weight)
    out = (numbers[0] @ numbers[1].t()).to(x.dtype)
    return out if bias is None else out + bias, (*numbers, bias)


def linear_fp8_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    if d_out.dtype == torch.float32:
        return linear_textbook_backward(saved, d_out)
    x, weight, bias = saved
    numbers = rounded_to(torch.float8_e5m2, d_out)
    d_x, d_weight = (numbers @ weight).to(d_out.dtype), (numbers.t() @ x).to(d_out.dtype)
    return (d_x, d_weight) if bias is None else (d_x, d_weight, d_out.sum(0))
