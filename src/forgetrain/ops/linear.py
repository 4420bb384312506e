"""Linear: y = x Wᵀ + b.

forward(x_TD, weight_OD, bias_O or None) -> y_TO in x's dtype, accumulated in fp32 by the matrix product;
backward -> (d_x, d_weight) or, with a bias, (d_x, d_weight, d_bias), in the dtypes of x, weight and bias.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from forgetrain.ops.variant import Variant
from forgetrain.ops.vjp import pull, record


def linear_textbook_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple]:
    out = x @ weight.t()
    return out if bias is None else out + bias, (x, weight, bias)


def linear_textbook_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    x, weight, bias = saved
    d_x, d_weight = d_out @ weight, d_out.t() @ x
    return (d_x, d_weight) if bias is None else (d_x, d_weight, d_out.sum(0))


def linear_torch_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple]:
    return record(F.linear, x, weight) if bias is None else record(F.linear, x, weight, bias)


def linear_torch_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


VARIANTS = {
    "textbook": Variant(linear_textbook_forward, linear_textbook_backward, "dgrad and wgrad written out, as Megatron"),
    "torch": Variant(linear_torch_forward, linear_torch_backward, "F.linear and its autograd, as transformers"),
}
