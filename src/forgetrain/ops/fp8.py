"""Linear with operands rounded to fp8: what an fp8 target's layers compute, in plain torch.

Of products of the layers alone: head and attention stay as they are. No plan names it: which precision a product has
follows from the target. A number is scaled by a power of two before it is rounded, the one that puts the largest
magnitude of its block into the upper half of the type's range, (max / 2, max]; products of these numbers are fp32. In
fp32, the gates' exact mode, it is the textbook's linear. Signatures are those of ``linear``.

    linear_fp8          a tensor is one block; activations and weights are e4m3, gradients e5m2
    linear_fp8_block    128 x 128 of a weight are one, 1 x 128 of anything else, along what the product contracts: a
                        row's inputs or outputs, and a column's tokens for the weight's gradient; all are e4m3
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from forgetrain.ops.linear import linear_textbook_backward, linear_textbook_forward


def rounded_to(dtype: torch.dtype, x: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """The nearest numbers of an fp8 type to x [R, C], in fp32; NaN where anything in the block is not finite.

    block: rows and columns of one, smaller at the edges of x; None is all of x."""
    top, (high, wide) = torch.finfo(dtype).max, block or x.shape
    whole = F.pad(x.float(), (0, -x.shape[1] % wide, 0, -x.shape[0] % high))
    blocks = whole.view(-1, high, whole.shape[1] // wide, wide)
    most = blocks.abs().amax((1, 3), keepdim=True).clamp(min=top * 2.0**-126)
    _, exponent = torch.frexp(top / most)
    scale = torch.exp2((exponent - 1).float())
    numbers = torch.where(most.isfinite(), (blocks * scale).to(dtype).float() / scale, torch.nan)
    return numbers.view(whole.shape)[: x.shape[0], : x.shape[1]]


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


def linear_fp8_block_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple]:
    if x.dtype == torch.float32:
        return linear_textbook_forward(x, weight, bias)
    e4m3 = torch.float8_e4m3fn
    numbers = rounded_to(e4m3, weight, (128, 128))
    out = (rounded_to(e4m3, x, (1, 128)) @ numbers.t()).to(x.dtype)
    return out if bias is None else out + bias, (rounded_to(e4m3, x, (128, 1)), numbers, bias)


def linear_fp8_block_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    if d_out.dtype == torch.float32:
        return linear_textbook_backward(saved, d_out)
    x, weight, bias = saved
    e4m3 = torch.float8_e4m3fn
    d_x = (rounded_to(e4m3, d_out, (1, 128)) @ weight).to(d_out.dtype)
    d_weight = (rounded_to(e4m3, d_out, (128, 1)).t() @ x).to(d_out.dtype)
    return (d_x, d_weight) if bias is None else (d_x, d_weight, d_out.sum(0))
