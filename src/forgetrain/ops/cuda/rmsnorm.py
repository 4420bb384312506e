"""Residual add and RMSNorm in one pass: each row is read once, its sum and its norm are written once.

    sum = x + branch * branch_scale            y = sum / sqrt(mean(sum²) + eps) * weight * out_scale

(RMSNorm: arXiv 1910.07467.) x, branch, sum, y are [T, D] in the activations' dtype, weight [D] in the weights'
dtype, rstd [T] fp32. Arithmetic and sums are fp32; the norm is taken of the rounded sum, which is what backward reads
again. Backward leaves each program's share of the weight's gradient in fp32 partials, which ``norm_weight_grad_``
adds in a fixed order: no atomics, so the same bits every time. Where ``largest`` is given, int32 [SLOTS], the largest
magnitude of y, or of the gradient, is noted there.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# Launch options and what a kernel's arguments are inside it: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forgetrain.ops.cuda.largest import note_largest

NORM_PROGRAMS = 1056  # of the backward kernel, at most: eight on each of an H200's 132 multiprocessors


@triton.jit
def add_norm_kernel(
    x_ptr, branch_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, largest_ptr, rows, branch_scale, out_scale, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_BRANCH: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :]
    inside = (row[:, None] < rows) & (cols < D)
    at = row.to(tl.int64)[:, None] * D + cols
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32) * branch_scale
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    y = (x * rstd[:, None] * weight * out_scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=inside)
    if PLACES:
        note_largest(largest_ptr, y, PLACES)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def norm_backward_kernel(
    d_y_ptr, x_ptr, rstd_ptr, weight_ptr, d_residual_ptr, d_x_ptr, partial_ptr, largest_ptr, rows, out_scale,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (cols < D)
        at = row.to(tl.int64)[:, None] * D + cols
        d_y = tl.load(d_y_ptr + at, mask=inside, other=0.0).to(tl.float32) * out_scale
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        if HAS_RESIDUAL:
            d_residual = tl.load(d_residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        normed = x * rstd
        d_weight += d_y * normed
        d_normed = d_y * weight
        d_x = rstd * (d_normed - normed * (tl.sum(d_normed * normed, axis=1)[:, None] / D))
        if HAS_RESIDUAL:
            d_x += d_residual
        d_x = d_x.to(d_x_ptr.dtype.element_ty)
        tl.store(d_x_ptr + at, d_x, mask=inside)
        if PLACES:
            note_largest(largest_ptr, d_x, PLACES)
    col = tl.arange(0, BLOCK)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + col, tl.sum(d_weight, axis=0), mask=col < D)


@triton.jit
def norm_weight_grad_kernel(
    partial_ptr, grad_ptr, D: tl.constexpr, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    norm = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, PROGRAMS, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (norm * PROGRAMS + row[:, None]) * D + cols[None, :]
        total += tl.load(partial_ptr + at, mask=(row[:, None] < PROGRAMS) & (cols[None, :] < D), other=0.0)
    at = grad_ptr + norm * D + cols
    tl.store(at, tl.load(at, mask=cols < D, other=0.0) + tl.sum(total, axis=0), mask=cols < D)


def add_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    branch_scale: float = 1.0,
    out_scale: float = 1.0,
    largest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, branch) -> (sum, y, rstd); without a branch the sum is x itself."""
    rows, width = x.shape
    y, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    total = x if branch is None else torch.empty_like(x)
    add_norm_kernel[(triton.cdiv(rows, 2),)](
        x, x if branch is None else branch, weight, total, y, rstd, largest, rows, branch_scale, out_scale, eps,
        D=width, BLOCK=triton.next_power_of_2(width), ROWS=2, HAS_BRANCH=branch is not None,
        PLACES=0 if largest is None else largest.numel(), num_warps=4,
    )  # fmt: skip
    return total, y, rstd


def add_norm_backward(
    saved: tuple[Tensor, Tensor, Tensor],
    d_y: Tensor,
    d_residual: Tensor | None,
    partial: Tensor,
    out_scale: float = 1.0,
    largest: Tensor | None = None,
) -> Tensor:
    """saved: (sum, rstd, weight). Returns the gradient of the sum, d_residual included: that of x, and of the branch
    before its scale. ``partial`` [programs, D] fp32 takes the weight's gradient in pieces, one from each program."""
    total, rstd, weight = saved
    rows, width = total.shape
    d_x = torch.empty_like(total)
    block, few = triton.next_power_of_2(width), width > 1024  # wide rows: few warps, two rows a turn
    norm_backward_kernel[(partial.shape[0],)](
        d_y, total, rstd, weight, d_y if d_residual is None else d_residual, d_x, partial, largest, rows, out_scale,
        D=width, BLOCK=block, ROWS=2 if few else 1, HAS_RESIDUAL=d_residual is not None,
        PLACES=0 if largest is None else largest.numel(), num_warps=2 if few else 4,
    )  # fmt: skip
    return d_x


def norm_weight_grad_(partial: Tensor, grad: Tensor) -> None:
    """Adds partial [norms, programs, D] fp32, in a fixed order, to grad [norms, D] fp32."""
    norms, programs, width = partial.shape
    norm_weight_grad_kernel[(norms, triton.cdiv(width, 32))](
        partial, grad, D=width, PROGRAMS=programs, ROWS=64, COLS=32, num_warps=4
    )
