"""Products of fp8 operands, whose numbers are scaled by units of whole tensors or of blocks.

    number = round(x / unit)        y = the sum of unit_x * unit_w * (x's number * w's), in fp32, rounded once to bf16

A unit is the power of two that puts the largest magnitude it is for into the top of the type's range, (max / 2, max]:
scaling rounds nothing, and no history is kept, so a resumed run has nothing to restore. Where that holds what is not
finite its unit is NaN, and so is all that follows. How far a unit reaches is ``fp8_tensor``'s and ``fp8_block``'s.

Hopper multiplies fp8 only along rows of both operands. So an operand is written twice, as it lies and turned: forward
reads the rows of x and of the weight, the input's gradient the rows of d_y and the turned weight, the gradient of the
weight d_y and x turned. In fp32, the gates' exact mode, operands are plain tensors and products those of ``linear``.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# Launch options, what a kernel's arguments are inside it and what its parts return: Triton's own types know none. Nor
# is it known that operands of one product are both tensors or both in fp8.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from forgetrain.ops.cuda.linear import linear_forward, linear_input_grad, linear_weight_grad_, product_

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: Both types' largest numbers are 1.75 times a power of two, whose exponent this is: 448 and 57344.
TOP = {E4M3: 8, E5M2: 15}
BITS = 8  # of a number
#: How far a unit of rows [R, K] reaches, as cuBLASLt numbers it: one of all, []; one of 128 of a row, [K / 128, R]; or
#: one of 128 x 128, [R / 128, K / 128], whose rows it wants in fours. The last of a row or a column is of what is left.
WHOLE, SPANS, SQUARES = 0, 4, 5


class Fp8(NamedTuple):
    """A matrix, or a stack of them, in fp8."""

    rows: Tensor  # [R, C]; empty where only the turned one is read any more
    turned: Tensor  # [C, R]
    unit: Tensor  # fp32: what numbers of rows are multiplied by
    turned_unit: Tensor  # and what those of turned are
    mode: int  # how far one of them reaches

    def part(self, i: int) -> Fp8:
        return Fp8(self.rows[i], self.turned[i], self.unit[i], self.turned_unit[i], self.mode)

    def for_backward(self) -> Fp8:
        return self._replace(rows=self.rows.new_empty(0), unit=self.unit.new_empty(0))


@triton.jit
def scale_and_unit(largest, TOP: tl.constexpr):
    """Of a largest magnitude, the bits of an fp32 number: what numbers are multiplied by before they are rounded, and
    what undoes it. The exponent of the largest becomes TOP, or one less where its mantissa is above 1.75."""
    power = TOP - ((largest >> 23) - 127) - ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    power = tl.minimum(power, 126)  # within fp32, for what is next to nothing
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    unit = tl.where(largest >= 0x7F800000, 0x7FC00000, (127 - power) << 23).to(tl.float32, bitcast=True)
    return scale, unit


@triton.jit
def load_four(x_ptr, row, col, rows, cols):
    """Of x [rows, cols] the rows four [W] begin with, the ones after those and so on: four of [W, C] in fp32. Rows come
    in fours."""
    at, inside = x_ptr + row[:, None] * cols + col[None, :], (row[:, None] < rows) & (col[None, :] < cols)
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + cols, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(at + 2 * cols, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(at + 3 * cols, mask=inside, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def round_four(a, b, c, d, scale, kind: tl.constexpr):
    return (a * scale).to(kind), (b * scale).to(kind), (c * scale).to(kind), (d * scale).to(kind)


@triton.jit
def store_four(rows_ptr, a, b, c, d, row, col, rows, cols):
    """The numbers of such rows, in fp8, where they were loaded from in rows [rows, cols]."""
    at, inside = rows_ptr + row[:, None] * cols + col[None, :], (row[:, None] < rows) & (col[None, :] < cols)
    tl.store(at, a, mask=inside)
    tl.store(at + cols, b, mask=inside)
    tl.store(at + 2 * cols, c, mask=inside)
    tl.store(at + 3 * cols, d, mask=inside)


@triton.jit
def store_turned(turned_ptr, a, b, c, d, word, col, words, cols, bits):
    """And turned, as words of four numbers, int32, into turned [cols, words]: what is turned goes from thread to
    thread, and byte by byte that takes four times as many steps. words: an argument, so that what divides it is known.
    bits: BITS, not known to compilers, since of a constant they make what ptxas 12.8 dies of."""
    a, b = a.to(tl.uint8, bitcast=True).to(tl.int32), b.to(tl.uint8, bitcast=True).to(tl.int32)
    c, d = c.to(tl.uint8, bitcast=True).to(tl.int32), d.to(tl.uint8, bitcast=True).to(tl.int32)
    at = turned_ptr + col[:, None].to(tl.int64) * words + word[None, :]
    four = (a | (b << bits)) | ((c | (d << bits)) << (2 * bits))
    tl.store(at, tl.trans(four), mask=(col[:, None] < cols) & (word[None, :] < words))


@triton.jit
def store_both(rows_ptr, turned_ptr, a, b, c, d, scale, word, col, rows, cols, words, bits, one):
    """Four rows each of x, times the scale, as they lie and turned. one: 1.0, not known to compilers either, so that
    numbers are rounded once for each: those that are both stored and taken apart ptxas 12.8 mixes up."""
    kind: tl.constexpr = rows_ptr.dtype.element_ty
    e, f, g, h = round_four(a, b, c, d, scale, kind)
    store_four(rows_ptr, e, f, g, h, 4 * word.to(tl.int64), col, rows, cols)
    a, b, c, d = round_four(a, b, c, d, scale * one, kind)
    store_turned(turned_ptr, a, b, c, d, word, col, words, cols, bits)


def words(turned: Tensor) -> Tensor:
    """Turned numbers [.., C, R] as the kernels store them, four in one: [.., C, R / 4]."""
    return turned.view(torch.int32)


def widened(numbers: Tensor, unit: Tensor, mode: int) -> Tensor:
    """What the numbers, [R, K], stand for, in fp32."""
    rows, cols = numbers.shape
    if mode == SPANS:
        unit = unit.t()
    if mode == SQUARES:
        unit = unit.repeat_interleave(128, 0)[:rows]
    if mode != WHOLE:
        unit = unit.repeat_interleave(128, 1)[:, :cols]
    return numbers.float() * unit


def fp8_product_(
    out: Tensor,
    a: tuple[Tensor, Tensor, int],
    b: tuple[Tensor, Tensor, int],
    rank: int,
    alpha: float = 1.0,
    adds: bool = False,
) -> Tensor:
    """out [M, N] = alpha * a [M, K] · b [N, K]ᵀ, or out += that; of both the numbers, their units and the mode. On a
    CPU the same numbers are multiplied in fp32. The tensor cores' own sum, which has fewer bits, is left unpromoted
    where units are of whole tensors and no gradient takes part: as Transformer Engine does it."""
    if not out.is_cuda:
        product = torch.mm(widened(*a), widened(*b).t()) * alpha
        return out.add_(product) if adds else out.copy_(product)
    fast = a[2] == b[2] == WHOLE and E5M2 not in (a[0].dtype, b[0].dtype)
    return product_(out, a[0], b[0].t(), rank, alpha, adds, (a[1], b[1]), fast, (a[2], b[2]))


def fp8_forward(x: Tensor | Fp8, weight: Tensor | Fp8, rank: int) -> Tensor:
    if isinstance(x, Tensor):
        return linear_forward(x, weight, rank)
    y = torch.empty(x.rows.shape[0], weight.rows.shape[0], dtype=torch.bfloat16, device=x.turned.device)
    return fp8_product_(y, (x.rows, x.unit, x.mode), (weight.rows, weight.unit, weight.mode), rank)


def fp8_input_grad(d_y: Tensor | Fp8, weight: Tensor | Fp8, rank: int, alpha: float = 1.0) -> Tensor:
    if isinstance(d_y, Tensor):
        return linear_input_grad(d_y, weight, rank, alpha)
    d_x = torch.empty(d_y.rows.shape[0], weight.turned.shape[0], dtype=torch.bfloat16, device=d_y.turned.device)
    turned = (weight.turned, weight.turned_unit, weight.mode)
    return fp8_product_(d_x, (d_y.rows, d_y.unit, d_y.mode), turned, rank, alpha)


def fp8_weight_grad_(grad: Tensor, d_y: Tensor | Fp8, x: Tensor | Fp8, rank: int, alpha: float = 1.0) -> None:
    """Adds alpha * d_yᵀ · x to grad."""
    if isinstance(d_y, Tensor):
        linear_weight_grad_(grad, d_y, x, rank, alpha)
    else:
        turned = ((y.turned, y.turned_unit, y.mode) for y in (d_y, x))
        fp8_product_(grad, *turned, rank, alpha, adds=True)
