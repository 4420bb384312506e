"""Residual: out = x + scale · branch, where scale is muP's scale_depth / sqrt(layers), or absent.

forward(x_TD, branch_TD, scale or None) -> out_TD in x's dtype; backward(saved, d_out) -> d_branch (d_x is d_out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetrain.ops.variant import Variant


def residual_textbook_forward(x: Tensor, branch: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    return torch.add(x, branch, alpha=1.0 if scale is None else scale), scale


def residual_textbook_backward(saved: float | None, d_out: Tensor) -> Tensor:
    return d_out if saved is None else d_out * saved


def residual_scaled_forward(x: Tensor, branch: Tensor, scale: float | None) -> tuple[Tensor, float | None]:
    return x + (branch if scale is None else branch * scale), scale


def residual_scaled_backward(saved: float | None, d_out: Tensor) -> Tensor:
    return d_out if saved is None else d_out * saved


VARIANTS = {
    "textbook": Variant(
        residual_textbook_forward, residual_textbook_backward, "scaled and added at once, rounded once"
    ),
    "scaled": Variant(
        residual_scaled_forward, residual_scaled_backward, "scaled, rounded, then added, as transformers"
    ),
}
