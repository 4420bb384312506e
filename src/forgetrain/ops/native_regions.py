"""The regions of ``forgetrain.ops.regions`` by a C++ kernel, ``ops/cpu/regions.cpp``: the same formulas, shapes and
dtypes. ``kernels``: its library for the dtype, ``compiled(kernel_source("regions"), dtype)``.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from forgetrain.ops.native import run_kernel, whole


def norm_native(kernels: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out, inverse = torch.empty_like(x), x.new_empty(rows, 1, dtype=torch.float32)
    whole(x.dtype, x, weight)
    run_kernel(kernels.norm, x, None, weight, None, out, inverse, rows, width, float(eps), 1.0)
    return out, inverse


def residual_norm_native(
    kernels: ctypes.CDLL, x: Tensor, branch: Tensor, weight: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    total, out, inverse = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, 1, dtype=torch.float32)
    whole(x.dtype, x, branch, weight)
    run_kernel(kernels.norm, x, branch, weight, total, out, inverse, rows, width, float(eps), float(scale))
    return total, out, inverse


def norm_backward_native(
    kernels: ctypes.CDLL, x: Tensor, inverse: Tensor, weight: Tensor, d_out: Tensor, d_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    d_x, d_weight = torch.empty_like(x), x.new_empty(width, dtype=torch.float32)
    span = 32
    sums = x.new_empty(-(-rows // span), width, dtype=torch.float32)
    whole(x.dtype, x, weight, d_out, *(() if d_residual is None else (d_residual,)))
    whole(torch.float32, inverse)
    run_kernel(kernels.norm_backward, x, inverse, weight, d_out, d_residual, d_x, d_weight, sums, rows, width, span)
    return d_x, d_weight


def swiglu_native(kernels: ctypes.CDLL, gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    whole(gate_up.dtype, gate_up)
    run_kernel(kernels.swiglu, gate_up, out, rows, width)
    return out


def swiglu_backward_native(kernels: ctypes.CDLL, gate_up: Tensor, d_out: Tensor) -> Tensor:
    d_gate_up = torch.empty_like(gate_up)
    whole(gate_up.dtype, gate_up, d_out)
    run_kernel(kernels.swiglu_backward, gate_up, d_out, d_gate_up, *d_out.shape)
    return d_gate_up


def head_norm_native(kernels: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, inverse = norm_native(kernels, x.view(-1, x.shape[-1]), weight, eps)
    return out.view(x.shape), inverse.view(*x.shape[:-1], 1)


def head_norm_backward_native(
    kernels: ctypes.CDLL, x: Tensor, inverse: Tensor, weight: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor]:
    flat, d_flat = (each.reshape(-1, x.shape[-1]).contiguous() for each in (x, d_out))
    d_x, d_weight = norm_backward_native(kernels, flat, inverse, weight, d_flat, None)
    return d_x.view(x.shape), d_weight


def entropy_native(kernels: ctypes.CDLL, logits: Tensor, labels: Tensor, d_nll: Tensor) -> Tensor:
    nll = torch.empty_like(d_nll)
    whole(logits.dtype, logits)
    whole(torch.int64, labels)
    whole(torch.float32, d_nll)
    run_kernel(kernels.entropy, logits, labels, d_nll, nll, *logits.shape)
    return nll


def vocabulary_sums_native(kernels: ctypes.CDLL, logits: Tensor, labels: Tensor, top: Tensor) -> Tensor:
    sums = top.new_empty(2, logits.shape[0])
    whole(logits.dtype, logits)
    whole(torch.int64, labels)
    whole(torch.float32, top)
    run_kernel(kernels.vocabulary_sums, logits, labels, top, sums, *logits.shape)
    return sums


def vocabulary_gradient_native(
    kernels: ctypes.CDLL, logits: Tensor, labels: Tensor, log_sum: Tensor, d_nll: Tensor
) -> None:
    whole(logits.dtype, logits)
    whole(torch.int64, labels)
    whole(torch.float32, log_sum, d_nll)
    run_kernel(kernels.vocabulary_gradient, logits, labels, log_sum, d_nll, *logits.shape)


def adamw_native(
    kernels: ctypes.CDLL,
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    rounded: Tensor | None,
    factor: Tensor,
    rates: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    whole(torch.float32, p, g, m, v, factor, rates)
    whole(torch.bfloat16, *(() if rounded is None else (rounded,)))
    numbers = map(float, (beta1, beta2, eps))
    run_kernel(kernels.adamw, p, g, m, v, rounded, factor, rates, p.numel(), *numbers)
