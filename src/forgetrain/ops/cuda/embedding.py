"""Embedding: gather and scale; backward adds each token's rows in a fixed order into the fp32 gradient.

x = table[tokens] * scale, tokens int64 [T], table [V, D], x [T, D] in the table's dtype. Backward sorts the tokens
(stable), and the program at the first of each run of equal tokens adds the run's rows: no atomics, so the same bits
every time. Sums are fp32.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# Launch options and what a kernel's arguments are inside it: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def embedding_kernel(tokens_ptr, table_ptr, x_ptr, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    token = tl.load(tokens_ptr + row)
    x = tl.load(table_ptr + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * D + cols, x * scale, mask=cols < D)


@triton.jit
def embedding_backward_kernel(
    sorted_ptr, order_ptr, d_x_ptr, grad_ptr, tokens, scale, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0)
    token = tl.load(sorted_ptr + first)
    previous = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    if token != previous:
        cols = tl.arange(0, BLOCK)
        row = tl.load(order_ptr + first)
        total = tl.load(d_x_ptr + row * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        start = first + 1
        following = tl.load(sorted_ptr + start, mask=start < tokens, other=-1)
        while following == token:  # most tokens of a micro-batch occur once or twice, a few very often
            place = start + tl.arange(0, ROWS)
            same = tl.load(sorted_ptr + place, mask=place < tokens, other=-1) == token
            rows = tl.load(order_ptr + place, mask=same, other=0)
            inside = same[:, None] & (cols[None, :] < D)
            more = tl.load(d_x_ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(more, axis=0)
            start += ROWS
            following = tl.load(sorted_ptr + start, mask=start < tokens, other=-1)
        at = grad_ptr + token * D + cols
        tl.store(at, tl.load(at, mask=cols < D, other=0.0) + total * scale, mask=cols < D)


def embedding_forward(tokens: Tensor, table: Tensor, scale: float) -> Tensor:
    width = table.shape[1]
    x = torch.empty(tokens.shape[0], width, dtype=table.dtype, device=table.device)
    embedding_kernel[(tokens.shape[0],)](
        tokens, table, x, scale, D=width, BLOCK=triton.next_power_of_2(width), num_warps=4
    )
    return x


def embedding_backward_(tokens: Tensor, d_x: Tensor, grad: Tensor, scale: float) -> None:
    """Adds d_x [T, D] times scale into the rows of grad [V, D] fp32."""
    ordered, order = torch.sort(tokens, stable=True)
    width = d_x.shape[1]
    embedding_backward_kernel[(tokens.shape[0],)](
        ordered, order, d_x, grad, tokens.shape[0], scale,
        D=width, BLOCK=triton.next_power_of_2(width), ROWS=16, num_warps=8,
    )  # fmt: skip
