"""The local vector-Jacobian product of one op, for variants whose backward must have autograd's own bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def record(function: Callable, *inputs: Tensor) -> tuple[Tensor, tuple]:
    """Runs ``function`` on leaves that share the inputs' memory. Returns its output, detached, and what pull needs."""
    leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    with torch.enable_grad():
        out = function(*leaves)
    return out.detach(), (out, leaves)


def pull(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the recorded inputs, in their order."""
    out, leaves = saved
    return torch.autograd.grad(out, leaves, d_out)
