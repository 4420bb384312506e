"""RoPE (arXiv 2104.09864, halves rotated as in Llama) on the packed product of the attention's input.

qkv is [T, (H + 2G) * K]: all query heads, then key heads, then value heads. Forward turns queries and keys where
they lie. Backward turns the gradients that attention left back: where they lie too, or, if they are three tensors,
packing them, dv included, in the same pass. Tables are cos and sin [S, K / 2] in fp32, arithmetic is fp32 and rounds
once. A token's position is its index modulo S, less where in its row its document begins if that is given: ``first``
[T], int32.

    first' = first * cos - second * sin        second' = second * cos + first * sin
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# Launch options and what a kernel's arguments are inside it: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def rope_tables(length: int, head_dim: int, theta: float, device: str) -> tuple[Tensor, Tensor]:
    """cos, sin [length, head_dim / 2] fp32; angles are taken in fp64, so that a table's error is its rounding."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float().to(device), angle.sin().float().to(device)


@triton.jit
def rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, first_ptr, tokens, length,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    HEADS_EACH: tl.constexpr, BACK: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, HALF)
    inside = (row[:, None] < tokens) & (col[None, :] < K // 2)
    position = row % length
    if RESET:
        position -= tl.load(first_ptr + row, mask=row < tokens, other=0)
    table = position[:, None] * (K // 2) + col[None, :]
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    if BACK:
        sin = -sin
    for i in range(HEADS_EACH):
        head = tl.program_id(1) * HEADS_EACH + i
        here = inside & (head < HEADS)
        at = qkv_ptr + row.to(tl.int64)[:, None] * WIDTH + head * K + col[None, :]
        first = tl.load(at, mask=here, other=0.0).to(tl.float32)
        second = tl.load(at + K // 2, mask=here, other=0.0).to(tl.float32)
        tl.store(at, first * cos - second * sin, mask=here)
        tl.store(at + K // 2, second * cos + first * sin, mask=here)


@triton.jit
def rope_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, out_ptr, cos_ptr, sin_ptr, first_ptr, tokens, length,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, COPIES: tl.constexpr,
    RESET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = row.to(tl.int64)[:, None]
    col = tl.arange(0, HALF)[None, :]
    inside = (row[:, None] < tokens) & (col < K // 2)
    position = row % length
    if RESET:
        position -= tl.load(first_ptr + row, mask=row < tokens, other=0)
    table = position[:, None] * (K // 2) + col
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    part = tl.program_id(1)  # one key/value head with its queries
    out = out_ptr + wide * ((H + 2 * G) * K) + col
    for i in range(H // G):
        head = part * (H // G) + i
        at = dq_ptr + wide * (H * K) + head * K + col
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + K // 2, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + head * K, first * cos + second * sin, mask=inside)
        tl.store(out + head * K + K // 2, second * cos - first * sin, mask=inside)
    first = tl.zeros([ROWS, HALF], dtype=tl.float32)
    second = tl.zeros([ROWS, HALF], dtype=tl.float32)
    v_first = tl.zeros([ROWS, HALF], dtype=tl.float32)
    v_second = tl.zeros([ROWS, HALF], dtype=tl.float32)
    for i in range(COPIES):
        at = wide * (G * COPIES * K) + (part * COPIES + i) * K + col
        first += tl.load(dk_ptr + at, mask=inside, other=0.0).to(tl.float32)
        second += tl.load(dk_ptr + at + K // 2, mask=inside, other=0.0).to(tl.float32)
        v_first += tl.load(dv_ptr + at, mask=inside, other=0.0).to(tl.float32)
        v_second += tl.load(dv_ptr + at + K // 2, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + (H + part) * K, first * cos + second * sin, mask=inside)
    tl.store(out + (H + part) * K + K // 2, second * cos - first * sin, mask=inside)
    tl.store(out + (H + G + part) * K, v_first, mask=inside)
    tl.store(out + (H + G + part) * K + K // 2, v_second, mask=inside)


def rope_forward_(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, head_dim: int, first: Tensor | None = None
) -> None:
    """Turns the H query and G key heads of qkv [T, (H + 2G) * K] in place."""
    turn_(qkv, cos, sin, heads + groups, head_dim, first, back=False)


def rope_backward_(
    d_qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int, head_dim: int, first: Tensor | None = None
) -> Tensor:
    """Turns the gradient of qkv back in place, and returns it."""
    turn_(d_qkv, cos, sin, heads + groups, head_dim, first, back=True)
    return d_qkv


def turn_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int, first: Tensor | None, back: bool) -> None:
    tokens, width = qkv.shape
    rows, each = 16, 3
    rope_kernel[(triton.cdiv(tokens, rows), triton.cdiv(heads, each))](
        qkv, cos, sin, first, tokens, cos.shape[0], WIDTH=width, HEADS=heads, K=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2), ROWS=rows, HEADS_EACH=each, BACK=back, RESET=first is not None,
        num_warps=4,
    )  # fmt: skip


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    groups: int,
    head_dim: int,
    first: Tensor | None = None,
) -> Tensor:
    """dq [T, H * K]; dk, dv [T, C * G * K], where each of the G heads has C copies side by side (C = R when attention
    was given expanded heads, else 1), which are summed in fp32. Returns the gradient of qkv [T, (H + 2G) * K]."""
    tokens, heads = dq.shape[0], dq.shape[1] // head_dim
    out = torch.empty(tokens, (heads + 2 * groups) * head_dim, dtype=dq.dtype, device=dq.device)
    rows = 16
    rope_backward_kernel[(triton.cdiv(tokens, rows), groups)](
        dq, dk, dv, out, cos, sin, first, tokens, cos.shape[0], H=heads, G=groups, K=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2), ROWS=rows, COPIES=dk.shape[1] // (groups * head_dim),
        RESET=first is not None, num_warps=4,
    )  # fmt: skip
    return out
