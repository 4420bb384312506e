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

from forgetrain.ops.cuda.fp8 import (
    BITS,
    E4M3,
    SPANS,
    SQUARES,
    TOP,
    Fp8,
    load_four,
    round_four,
    scale_and_unit,
    store_both,
    store_four,
    store_turned,
    words,
)
from forgetrain.ops.cuda.largest import magnitude


@triton.jit
def magnitude_of_four(a, b, c, d):
    """The largest of the four, place by place."""
    return tl.maximum(tl.maximum(magnitude(a), magnitude(b)), tl.maximum(magnitude(c), magnitude(d)))


@triton.jit
def span_of_row(x, unit_ptr, row, rows, TOP: tl.constexpr):
    """What the numbers of x [W, C] are multiplied by, row by row; their units are stored."""
    scale, unit = scale_and_unit(tl.max(magnitude(x), axis=1), TOP)
    tl.store(unit_ptr + row, unit, mask=row < rows)
    return scale[:, None]


@triton.jit
def quantise_spans_kernel(
    x_ptr, rows_ptr, turned_ptr, unit_ptr, turned_unit_ptr, rows, cols, words, bits,
    TOP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    high, wide = tl.program_id(0), tl.program_id(1).to(tl.int64)
    word, col = high * (SIDE // 4) + tl.arange(0, SIDE // 4), tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    row = 4 * word.to(tl.int64)
    kind: tl.constexpr = rows_ptr.dtype.element_ty
    a, b, c, d = load_four(x_ptr, row, col, rows, cols)
    units = unit_ptr + wide * rows
    store_four(
        rows_ptr,
        (a * span_of_row(a, units, row, rows, TOP)).to(kind),
        (b * span_of_row(b, units, row + 1, rows, TOP)).to(kind),
        (c * span_of_row(c, units, row + 2, rows, TOP)).to(kind),
        (d * span_of_row(d, units, row + 3, rows, TOP)).to(kind),
        row, col, rows, cols,
    )  # fmt: skip
    scale, unit = scale_and_unit(tl.max(magnitude_of_four(a, b, c, d), axis=0), TOP)
    tl.store(turned_unit_ptr + high.to(tl.int64) * cols + col, unit, mask=col < cols)
    a, b, c, d = round_four(a, b, c, d, scale[None, :], kind)
    store_turned(turned_ptr, a, b, c, d, word, col, words, cols, bits)


@triton.jit
def quantise_squares_kernel(
    x_ptr, rows_ptr, turned_ptr, unit_ptr, turned_unit_ptr, rows, cols, words, bits, one, x_step, across, down,
    TOP: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    high, wide, part = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    word, col = high * (SIDE // 4) + tl.arange(0, SIDE // 4), wide * SIDE + tl.arange(0, SIDE)
    a, b, c, d = load_four(x_ptr + part * x_step, 4 * word.to(tl.int64), col, rows, cols)
    scale, unit = scale_and_unit(tl.max(magnitude_of_four(a, b, c, d)), TOP)
    store_both(
        rows_ptr + part * rows * cols, turned_ptr + part * cols * words,
        a, b, c, d, scale, word, col, rows, cols, words, bits, one,
    )  # fmt: skip
    tl.store(unit_ptr + (part * tl.num_programs(0) + high) * across + wide, unit)
    tl.store(turned_unit_ptr + (part * tl.num_programs(1) + wide) * down + high, unit)


def quantise_spans(x: Tensor) -> Fp8:
    """x [R, C] bf16, contiguous: an activation or a gradient."""
    (rows, cols), like = x.shape, {"device": x.device, "dtype": torch.float32}
    grid = (-(-rows // 128), -(-cols // 128))
    numbers = (torch.empty(*sides, dtype=E4M3, device=x.device) for sides in ((rows, cols), (cols, rows)))
    out = Fp8(*numbers, torch.empty(grid[1], rows, **like), torch.empty(grid[0], cols, **like), SPANS)
    quantise_spans_kernel[grid](
        x, out.rows, words(out.turned), out.unit, out.turned_unit, rows, cols, rows // 4, BITS,
        TOP=TOP[E4M3], SIDE=128, num_warps=8,
    )  # fmt: skip
    return out


def quantise_squares_(x: Tensor, out: Fp8) -> Fp8:
    """x [P, R, C] bf16, a stack of weights with any step between them, into out, which is contiguous."""
    parts, rows, cols = x.shape
    grid = (-(-rows // 128), -(-cols // 128), parts)
    quantise_squares_kernel[grid](
        x, out.rows, words(out.turned), out.unit, out.turned_unit, rows, cols, rows // 4, BITS, 1.0,
        x.stride(0), out.unit.shape[2], out.turned_unit.shape[2],
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
