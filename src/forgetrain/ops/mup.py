"""muP's output scale: hidden states ÷ (hidden_size / dim_model_base) before the head.

forward(x_TD, divisor) -> x_TD in its dtype; backward(saved, d_out) -> d_x.
"""

from __future__ import annotations

from torch import Tensor

from forgetrain.ops.variant import Variant


def mup_multiply_forward(x: Tensor, divisor: float) -> tuple[Tensor, float]:
    return x * (1.0 / divisor), divisor


def mup_multiply_backward(saved: float, d_out: Tensor) -> Tensor:
    return d_out * (1.0 / saved)


def mup_divide_forward(x: Tensor, divisor: float) -> tuple[Tensor, float]:
    return x / divisor, divisor


def mup_divide_backward(saved: float, d_out: Tensor) -> Tensor:
    return d_out / saved


VARIANTS = {
    "textbook": Variant(mup_multiply_forward, mup_multiply_backward, "times the reciprocal"),
    "divide": Variant(mup_divide_forward, mup_divide_backward, "divided, as MiniCPM's published code"),
}
