"""Operands in fp8 with units of blocks (blockwise scaling, as DeepSeek-V3 was trained).

A weight has a unit of every 128 x 128, anything else one of every 128 along what a product contracts: as it lies of
those next to each other in a row, turned of those below each other. So no kernel notes a largest magnitude and no
pass looks for it: the program that rounds 128 x 128 numbers has read all that it needs. All are e4m3, whose range
need hold no more than a block.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# Launch options, what a kernel's arguments are inside it and what its parts return: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forgetrain.ops.cuda.fp8 import E4M3, SPANS, SQUARES, TOP, Fp8, scale_and_unit


@triton.jit
def quantise_spans_kernel(
    x_ptr, rows_ptr, turned_ptr, unit_ptr, turned_unit_ptr, rows, cols, TOP: tl.constexpr, SIDE: tl.constexpr
):
    row, col = tl.program_id(0) * SIDE + tl.arange(0, SIDE), tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    row = row.to(tl.int64)
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    x = tl.load(x_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale, unit = scale_and_unit(tl.max(magnitude, axis=1), TOP)
    number = (x * scale[:, None]).to(rows_ptr.dtype.element_ty)
    tl.store(rows_ptr + row[:, None] * cols + col[None, :], number, mask=inside)
    tl.store(unit_ptr + tl.program_id(1).to(tl.int64) * rows + row, unit, mask=row < rows)
    scale, unit = scale_and_unit(tl.max(magnitude, axis=0), TOP)
    number = (x * scale[None, :]).to(rows_ptr.dtype.element_ty)
    at = turned_ptr + col.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(at, tl.trans(number), mask=tl.trans(inside))
    tl.store(turned_unit_ptr + tl.program_id(0).to(tl.int64) * cols + col, unit, mask=col < cols)


@triton.jit
def quantise_squares_kernel(
    x_ptr, rows_ptr, turned_ptr, unit_ptr, turned_unit_ptr, rows, cols, x_step, across, down,
    TOP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    high, wide, part = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = (high * SIDE + tl.arange(0, SIDE)).to(tl.int64)[:, None]
    col = (wide * SIDE + tl.arange(0, SIDE))[None, :]
    inside = (row < rows) & (col < cols)
    x = tl.load(x_ptr + part * x_step + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    scale, unit = scale_and_unit(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), TOP)
    number = (x * scale).to(rows_ptr.dtype.element_ty)
    begin = part * rows * cols
    tl.store(rows_ptr + begin + row * cols + col, number, mask=inside)
    at = turned_ptr + begin + tl.trans(col).to(tl.int64) * rows + tl.trans(row)
    tl.store(at, tl.trans(number), mask=tl.trans(inside))
    tl.store(unit_ptr + (part * tl.num_programs(0) + high) * across + wide, unit)
    tl.store(turned_unit_ptr + (part * tl.num_programs(1) + wide) * down + high, unit)


def quantise_spans(x: Tensor) -> Fp8:
    """x [R, C] bf16, contiguous: an activation or a gradient."""
    (rows, cols), like = x.shape, {"device": x.device, "dtype": torch.float32}
    grid = (-(-rows // 128), -(-cols // 128))
    numbers = (torch.empty(*sides, dtype=E4M3, device=x.device) for sides in ((rows, cols), (cols, rows)))
    out = Fp8(*numbers, torch.empty(grid[1], rows, **like), torch.empty(grid[0], cols, **like), SPANS)
    quantise_spans_kernel[grid](x, *out[:4], rows, cols, TOP=TOP[E4M3], SIDE=128, num_warps=8)
    return out


def quantise_squares_(x: Tensor, out: Fp8) -> Fp8:
    """x [P, R, C] bf16, a stack of weights with any step between them, into out, which is contiguous."""
    parts, rows, cols = x.shape
    grid = (-(-rows // 128), -(-cols // 128), parts)
    quantise_squares_kernel[grid](
        x, *out[:4], rows, cols, x.stride(0), out.unit.shape[2], out.turned_unit.shape[2],
        TOP=TOP[E4M3], SIDE=128, num_warps=8,
    )  # fmt: skip
    return out


def empty_squares(shape: tuple[int, ...], device: torch.device | str) -> Fp8:
    """Of a stack of matrices. Units that fill a row up to a multiple of four, as cuBLASLt wants it, stay zero."""
    parts, rows, cols = shape
    high, wide = -(-rows // 128), -(-cols // 128)
    numbers = (torch.empty(parts, *sides, dtype=E4M3, device=device) for sides in ((rows, cols), (cols, rows)))
    units = (torch.zeros(parts, n, -(-m // 4) * 4, device=device) for n, m in ((high, wide), (wide, high)))
    return Fp8(*numbers, *units, SQUARES)
