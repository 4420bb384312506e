"""Operands in fp8 with one unit of a whole tensor, from its own largest magnitude of now (tensorwise, "current"
scaling).

Activations and weights are e4m3, gradients e5m2. The largest magnitude is known before anything is rounded: kernels
note it as they write, or a pass of its own finds it.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Launch options, what a kernel's arguments are inside it and what its parts return: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forgetrain.ops.cuda.fp8 import BITS, E4M3, E5M2, TOP, WHOLE, Fp8, load_four, scale_and_unit, store_both, words
from forgetrain.ops.cuda.largest import note_largest

#: Units of a stack lie 16 bytes apart: cuBLASLt multiplies by none that lies elsewhere, and says status 15.
UNIT_STEP = 4


@triton.jit
def largest_kernel(x_ptr, largest_ptr, size, x_step, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    note_largest(largest_ptr + part * PLACES, tl.load(x_ptr + part * x_step + at, mask=at < size, other=0.0), PLACES)


@triton.jit
def quantise_kernel(
    x_ptr, largest_ptr, rows_ptr, turned_ptr, unit_ptr, rows, cols, words, bits, one, x_step,
    TOP: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNIT_STEP: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(2).to(tl.int64)
    largest = tl.max(tl.load(largest_ptr + part * PLACES + tl.arange(0, PLACES)))
    scale, unit = scale_and_unit(largest, TOP)
    word = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    a, b, c, d = load_four(x_ptr + part * x_step, 4 * word.to(tl.int64), col, rows, cols)
    store_both(
        rows_ptr + part * rows * cols, turned_ptr + part * cols * words,
        a, b, c, d, scale, word, col, rows, cols, words, bits, one,
    )  # fmt: skip
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(unit_ptr + part * UNIT_STEP, unit)


def find_largest_(x: Tensor, largest: Tensor) -> Tensor:
    """Adds the largest magnitude of x [R, C], or of each of a stack [P, R, C], to largest [SLOTS] or [P, SLOTS] int32,
    for what no kernel gathered on its way; returns it."""
    parts, size = (1 if x.dim() == 2 else x.shape[0]), x.shape[-2] * x.shape[-1]
    grid = (triton.cdiv(size, 8192), parts)
    largest_kernel[grid](x, largest, size, x.stride(0), PLACES=largest.shape[-1], BLOCK=8192, num_warps=8)
    return largest


def quantise_(x: Tensor, largest: Tensor, out: Fp8) -> Fp8:
    """x [R, C] bf16, or a stack of such, [P, R, C] with any step between them, into out; all else is contiguous."""
    parts, (rows, cols) = (1 if x.dim() == 2 else x.shape[0]), x.shape[-2:]
    grid = (triton.cdiv(rows, 128), triton.cdiv(cols, 128), parts)
    quantise_kernel[grid](
        x, largest, out.rows, words(out.turned), out.unit, rows, cols, rows // 4, BITS, 1.0, x.stride(0),
        TOP=TOP[out.turned.dtype], PLACES=largest.shape[-1], ROWS=128, COLS=128, UNIT_STEP=UNIT_STEP, num_warps=8,
    )  # fmt: skip
    return out


def quantise(x: Tensor, largest: Tensor, gradient: bool = False) -> Fp8:
    return quantise_(x, largest, empty_fp8(x.shape, E5M2 if gradient else E4M3, x.device))


def empty_fp8(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Fp8:
    """Of a matrix, or of a stack of them."""
    *stack, rows, cols = shape
    both = (torch.empty(*stack, *sides, dtype=dtype, device=device) for sides in ((rows, cols), (cols, rows)))
    unit = torch.empty(*stack, UNIT_STEP, dtype=torch.float32, device=device)[..., 0]
    return Fp8(*both, unit, unit, WHOLE)
