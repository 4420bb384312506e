"""SwiGLU (arXiv 2002.05202) on the packed product: gate_up [T, 2F] holds gates, then ups, or both in turns.

    act = silu(gate) * up            d_up = d_act * silu(gate)
    d_gate = d_act * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

Arithmetic is fp32 and rounds once. Backward writes the gradient of gate_up over gate_up. Where ``largest`` is given,
int32 [SLOTS], the largest magnitude of what is written is noted there.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false
# Launch options and what a kernel's arguments are inside it: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forgetrain.ops.cuda.largest import note_largest


@triton.jit
def swiglu_kernel(
    gate_up_ptr, act_ptr, largest_ptr, rows,
    F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALTERNATING: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < F)
    gate, up = load_gates_and_ups(gate_up_ptr + row * (2 * F), inside, row < rows, F, ROWS, COLS, ALTERNATING)
    act = (gate * tl.sigmoid(gate) * up).to(act_ptr.dtype.element_ty)
    tl.store(act_ptr + row * F + col, act, mask=inside)
    if PLACES:
        note_largest(largest_ptr, act, PLACES)


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr, d_act_ptr, largest_ptr, rows,
    F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALTERNATING: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
    inside = (row < rows) & (col < F)
    begin = gate_up_ptr + row * (2 * F)
    gate, up = load_gates_and_ups(begin, inside, row < rows, F, ROWS, COLS, ALTERNATING)
    d_act = tl.load(d_act_ptr + row * F + col, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate, d_up = d_act * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), d_act * gate * sigmoid
    if ALTERNATING:
        both = (tl.program_id(1) * 2 * COLS + tl.arange(0, 2 * COLS))[None, :]
        pairs = tl.reshape(tl.join(d_gate, d_up), [ROWS, 2 * COLS])
        tl.store(begin + both, pairs, mask=(row < rows) & (both < 2 * F))
    else:
        tl.store(begin + col, d_gate, mask=inside)
        tl.store(begin + col + F, d_up, mask=inside)
    if PLACES:
        note_largest(largest_ptr, d_gate.to(gate_up_ptr.dtype.element_ty), PLACES)
        note_largest(largest_ptr, d_up.to(gate_up_ptr.dtype.element_ty), PLACES)


@triton.jit
def load_gates_and_ups(
    begin, inside, real, F: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ALTERNATING: tl.constexpr
):  # fmt: skip
    """Of this program's columns, [ROWS, COLS] each. What alternates is read in one piece and parted in registers: loads
    of every other number would take half of the memory's rate."""
    if ALTERNATING:
        both = (tl.program_id(1) * 2 * COLS + tl.arange(0, 2 * COLS))[None, :]
        pairs = tl.load(begin + both, mask=real & (both < 2 * F), other=0.0)
        gate, up = tl.split(tl.reshape(pairs, [ROWS, COLS, 2]))
    else:
        col = (tl.program_id(1) * COLS + tl.arange(0, COLS))[None, :]
        gate = tl.load(begin + col, mask=inside, other=0.0)
        up = tl.load(begin + col + F, mask=inside, other=0.0)
    return gate.to(tl.float32), up.to(tl.float32)


def swiglu_forward(gate_up: Tensor, alternating: bool = False, largest: Tensor | None = None) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    act = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (rows, triton.cdiv(width, 1024))
    swiglu_kernel[grid](
        gate_up, act, largest, rows, F=width, ROWS=1, COLS=1024, ALTERNATING=alternating,
        PLACES=0 if largest is None else largest.numel(), num_warps=4,
    )  # fmt: skip
    return act


def swiglu_backward_(
    gate_up: Tensor, d_act: Tensor, alternating: bool = False, largest: Tensor | None = None
) -> Tensor:
    """Overwrites gate_up [T, 2F] with its gradient, and returns it."""
    rows, width = d_act.shape
    grid = (rows, triton.cdiv(width, 1024))
    swiglu_backward_kernel[grid](
        gate_up, d_act, largest, rows, F=width, ROWS=1, COLS=1024, ALTERNATING=alternating,
        PLACES=0 if largest is None else largest.numel(), num_warps=4,
    )  # fmt: skip
    return gate_up
