"""Products of fp8 operands, each scaled by its own largest magnitude of now (tensorwise, "current" scaling).

    number = round(x / unit)        y = unit_x * unit_w * (x's numbers · w's numbersᵀ), in fp32, rounded once to bf16

Activations and weights are e4m3, gradients e5m2. A unit is the power of two that puts the largest magnitude into the
top of the type's range, (max / 2, max]: scaling rounds nothing, and no history is kept, so a resumed run has nothing
to restore. Where an operand holds what is not finite its unit is NaN, and so is all that follows.

Hopper multiplies fp8 only along rows of both operands. So an operand is written twice, as it lies and turned: forward
reads the rows of x and of the weight, the input's gradient the rows of d_y and the turned weight, the gradient of the
weight d_y and x turned. In fp32, the gates' exact mode, operands are plain tensors and products those of ``linear``.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportArgumentType=false
# Launch options and what a kernel's arguments are inside it: Triton's own types know neither. Nor is it known that
# operands of one product are both tensors or both in fp8.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from forgetrain.ops.cuda.largest import note_largest
from forgetrain.ops.cuda.linear import linear_forward, linear_input_grad, linear_weight_grad_, product_

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: Both types' largest numbers are 1.75 times a power of two, whose exponent this is: 448 and 57344.
TOP = {E4M3: 8, E5M2: 15}


class Fp8(NamedTuple):
    """A matrix, or a stack of them, in fp8."""

    rows: Tensor  # [R, C]; empty where only the turned one is read any more
    turned: Tensor  # [C, R]
    unit: Tensor  # fp32 []: what a number is multiplied by


@triton.jit
def largest_kernel(x_ptr, largest_ptr, size, x_step, PLACES: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    note_largest(largest_ptr + part * PLACES, tl.load(x_ptr + part * x_step + at, mask=at < size, other=0.0), PLACES)


@triton.jit
def quantise_kernel(
    x_ptr, largest_ptr, rows_ptr, turned_ptr, unit_ptr, rows, cols, x_step,
    TOP: tl.constexpr, PLACES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(2).to(tl.int64)
    largest = tl.max(tl.load(largest_ptr + part * PLACES + tl.arange(0, PLACES)))
    # x * 2^power: the exponent of the largest becomes TOP, or one less where its mantissa is above 1.75; within fp32
    power = TOP - ((largest >> 23) - 127) - ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    power = tl.minimum(power, 126)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < cols)
    x = tl.load(x_ptr + part * x_step + row * cols + col, mask=inside, other=0.0).to(tl.float32)
    number = (x * scale).to(rows_ptr.dtype.element_ty)
    begin = part * rows * cols
    tl.store(rows_ptr + begin + row * cols + col, number, mask=inside)
    at = turned_ptr + begin + tl.trans(col).to(tl.int64) * rows + tl.trans(row)
    tl.store(at, tl.trans(number), mask=tl.trans(inside))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        bits = tl.where(largest >= 0x7F800000, 0x7FC00000, (127 - power) << 23)
        tl.store(unit_ptr + part, bits.to(tl.float32, bitcast=True))


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
        x, largest, out.rows, out.turned, out.unit, rows, cols, x.stride(0),
        TOP=TOP[out.turned.dtype], PLACES=largest.shape[-1], ROWS=128, COLS=128, num_warps=8,
    )  # fmt: skip
    return out


def quantise(x: Tensor, largest: Tensor, gradient: bool = False) -> Fp8:
    return quantise_(x, largest, empty_fp8(x.shape, E5M2 if gradient else E4M3, x.device))


def empty_fp8(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Fp8:
    """Of a matrix, or of a stack of them."""
    *stack, rows, cols = shape
    both = (torch.empty(*stack, *sides, dtype=dtype, device=device) for sides in ((rows, cols), (cols, rows)))
    return Fp8(*both, torch.empty(stack, dtype=torch.float32, device=device))


def fp8_product_(
    out: Tensor, a: Tensor, b: Tensor, units: tuple[Tensor, Tensor], rank: int, alpha: float = 1.0, adds: bool = False
) -> Tensor:
    """out [M, N] = alpha * units * a [M, K] · b [N, K]ᵀ, or out += that. On a CPU the same numbers are multiplied in
    fp32. The tensor cores' own sum, which has fewer bits, is left unpromoted where no gradient takes part: as
    Transformer Engine does it."""
    if not out.is_cuda:
        product = torch.mm(a.float(), b.float().t()) * (units[0] * units[1] * alpha)
        return out.add_(product) if adds else out.copy_(product)
    return product_(out, a, b.t(), rank, alpha, adds, units, fast=E5M2 not in (a.dtype, b.dtype))


def fp8_forward(x: Tensor | Fp8, weight: Tensor | Fp8, rank: int) -> Tensor:
    if isinstance(x, Tensor):
        return linear_forward(x, weight, rank)
    y = torch.empty(x.rows.shape[0], weight.rows.shape[0], dtype=torch.bfloat16, device=x.turned.device)
    return fp8_product_(y, x.rows, weight.rows, (x.unit, weight.unit), rank)


def fp8_input_grad(d_y: Tensor | Fp8, weight: Tensor | Fp8, rank: int, alpha: float = 1.0) -> Tensor:
    if isinstance(d_y, Tensor):
        return linear_input_grad(d_y, weight, rank, alpha)
    d_x = torch.empty(d_y.rows.shape[0], weight.turned.shape[0], dtype=torch.bfloat16, device=d_y.turned.device)
    return fp8_product_(d_x, d_y.rows, weight.turned, (d_y.unit, weight.unit), rank, alpha)


def fp8_weight_grad_(grad: Tensor, d_y: Tensor | Fp8, x: Tensor | Fp8, rank: int, alpha: float = 1.0) -> None:
    """Adds alpha * d_yᵀ · x to grad."""
    if isinstance(d_y, Tensor):
        linear_weight_grad_(grad, d_y, x, rank, alpha)
    else:
        fp8_product_(grad, d_y.turned, x.turned, (d_y.unit, x.unit), rank, alpha, adds=True)
