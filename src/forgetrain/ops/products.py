"""Products of two matrices by torch's libraries, as the production schedule asks for them; a plan's ``products``
chooses between these and the kernel of ``forgetrain.ops.native``.

torch.mm has MKL for fp32 on x86, which is behind oneDNN with AVX-512 on other vendors' cores and ahead of it with AVX2;
in bf16 it has oneDNN.
Shapes: T tokens, I and O a weight's columns and rows. Products accumulate in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetrain.ops.regions import transposed_region


def product_torch(a: Tensor, b: Tensor) -> Tensor:
    """a_MK · b_NKᵀ -> [M, N] in their dtype."""
    return torch.mm(a, b.t())


def product_onednn(a: Tensor, b: Tensor) -> Tensor:
    """The same; ``a`` must be contiguous lest it be copied, ``b`` may be a transposed view."""
    if a.is_cpu and a.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


def weight_gradient_torch(grad: Tensor, d_out: Tensor, x: Tensor, replace: bool) -> None:
    """d_out_TOᵀ · x_TI into grad_OI, fp32: in place of what is there, or added to it."""
    if d_out.dtype == torch.float32:
        grad.addmm_(d_out.t(), x, beta=0.0 if replace else 1.0)
    elif replace:
        grad.copy_(torch.mm(d_out.t(), x))
    else:
        grad.add_(torch.mm(d_out.t(), x))


def weight_gradient_onednn(grad: Tensor, d_out: Tensor, x: Tensor, replace: bool) -> None:
    """The same. oneDNN wants its first matrix contiguous, so the narrower of the two is transposed beforehand."""
    if not (d_out.is_cpu and d_out.dtype == torch.float32):
        return weight_gradient_torch(grad, d_out, x, replace)
    if d_out.shape[1] <= x.shape[1]:
        found = product_onednn(transposed_region(d_out), x.t())
    else:
        found = product_onednn(transposed_region(x), d_out.t()).t()
    if replace:
        grad.copy_(found)
    else:
        grad.add_(found)
    return None
