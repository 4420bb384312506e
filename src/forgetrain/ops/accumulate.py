"""Gradient accumulation over micro-batches, in fp32.

forward(total or None, grad) -> total fp32: None is the first micro-batch; no backward. The two differ only in the sign
of zero: 0 + (-0) is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetrain.ops.variant import Variant


def accumulate_textbook_forward(total: Tensor | None, grad: Tensor) -> Tensor:
    return grad.float() if total is None else total.add_(grad)


def accumulate_zeros_forward(total: Tensor | None, grad: Tensor) -> Tensor:
    total = torch.zeros_like(grad, dtype=torch.float32) if total is None else total
    return total.add_(grad)


VARIANTS = {
    "textbook": Variant(accumulate_textbook_forward, None, "the first gradient starts the sum, as torch's .grad"),
    "zeros": Variant(accumulate_zeros_forward, None, "added to a zeroed buffer, as Megatron's main_grad"),
}
