"""SwiGLU (arXiv 2002.05202) on the packed product: gate_up [T, 2F] holds gates, then ups, or both in turns.

    act = silu(gate) * up            d_up = d_act * silu(gate)
    d_gate = d_act * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Arithmetic is fp32 and rounds once. Backward writes the gradient of gate_up over gate_up.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# Launch options and what a kernel's arguments are inside it: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def swiglu_kernel(
    gate_up_ptr, act_ptr, rows,
    F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < F)
    at = gate_up_ptr + row * (2 * F) + col * STEP
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + UP, mask=inside, other=0.0).to(tl.float32)
    tl.store(act_ptr + row * F + col, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr, d_act_ptr, rows,
    F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < F)
    at = gate_up_ptr + row * (2 * F) + col * STEP
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + UP, mask=inside, other=0.0).to(tl.float32)
    d_act = tl.load(d_act_ptr + row * F + col, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(at, d_act * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), mask=inside)
    tl.store(at + UP, d_act * gate * sigmoid, mask=inside)


def places_of(width: int, alternating: bool) -> dict[str, int]:
    """Where the gates of [T, 2 * width] lie, and the ups behind them."""
    return {"STEP": 2, "UP": 1} if alternating else {"STEP": 1, "UP": width}


def swiglu_forward(gate_up: Tensor, alternating: bool = False) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    act = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(width, 1024))
    swiglu_kernel[grid](
        gate_up, act, rows, F=width, ROWS=1, COLS=1024, **places_of(width, alternating), num_warps=4
    )  # fmt: skip
    return act


def swiglu_backward_(gate_up: Tensor, d_act: Tensor, alternating: bool = False) -> Tensor:
    """Overwrites gate_up [T, 2F] with its gradient, and returns it."""
    rows, width = d_act.shape
    grid = (rows, triton.cdiv(width, 1024))
    swiglu_backward_kernel[grid](
        gate_up, d_act, rows, F=width, ROWS=1, COLS=1024, **places_of(width, alternating), num_warps=4
    )  # fmt: skip
    return gate_up
