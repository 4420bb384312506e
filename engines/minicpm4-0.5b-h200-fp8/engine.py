"""A pre-training engine for minicpm4-0.5b-h200-fp8, written by ForgeTrain: forward, loss, backward, update.

Plan:
    schedule = hopper
    optimizer_state = sharded
    attention_library = flash4
    swiglu_library = triton
    weight_gradients = inline
    rank_qkv_forward = 5
    rank_qkv_input_grad = 0
    rank_qkv_weight_grad = 0
    rank_o_forward = 3
    rank_o_input_grad = 0
    rank_o_weight_grad = 0
    rank_gate_up_forward = 7
    rank_gate_up_input_grad = 0
    rank_gate_up_weight_grad = 0
    rank_down_forward = 4
    rank_down_input_grad = 0
    rank_down_weight_grad = 1
    rank_head_forward = 1
    rank_head_input_grad = 1
    rank_head_weight_grad = 0

Shape letters: T tokens of a micro-batch (rows N times positions S), D hidden, F intermediate, H query heads, G
key/value heads, K head_dim, V vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 73448,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "qk_norm": False,
    "scale_emb": 12.0,
    "scale_depth": 1.4,
    "dim_model_base": 256,
}
DOCUMENTS = "ignore"
DETERMINISTIC = False  # the attention's backward adds in an order of its own
PRECISIONS = ("fp32", "fp8")  # the first for gates
LAYERS, HEADS, GROUPS, HEAD_DIM = 24, 16, 2, 64
HIDDEN, INTERMEDIATE, VOCAB = 1024, 4096, 73448
Q_WIDTH, KV_WIDTH = HEADS * HEAD_DIM, GROUPS * HEAD_DIM
EPS, ROPE_THETA = 1e-06, 10000.0
# muP: embeddings, residual branches and the hidden states before the head are multiplied by these.
EMBEDDING_SCALE, RESIDUAL_SCALE, HEAD_SCALE = 12.0, 0.28577380332470415, 0.25

# ---------------------------------------------------------------------------------------------------------------------
# Ops.


# The largest magnitude of what a kernel writes, gathered on the way: fp8 operands are scaled by it.
#
# A magnitude is the bits of an fp32 number without its sign, int32: in the order of the numbers, infinity above all
# finite ones and NaN above it, and the largest of many is the same in whatever order they come. Programs share SLOTS
# places, since at a single one they would wait for each other; who reads takes the largest of all.

SLOTS = 128


@triton.jit
def note_largest(largest_ptr, x, PLACES: tl.constexpr):
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(largest_ptr + tl.program_id(0) % PLACES, tl.max(bits), sem="relaxed")


# Products by cuBLASLt, which lets us name the algorithm.
#
#     forward    y [T, O] = x [T, I] · weightᵀ
#     backward   d_x = alpha * d_y · weight            grad [O, I] (fp32) += alpha * d_yᵀ · x
#
# A weight is [O, I], as Hugging Face stores it; accumulation is fp32, and rounds once. The weight's gradient is
# accumulated inside the product, which reads and writes the fp32 buffer itself. alpha carries a constant that scales
# the branch (muP), which so costs nothing.
#
# ``rank`` says which algorithm of those that cuBLASLt proposes for the shape, best guess first, is taken: its guess is
# often not the fastest. A number written down, and not a race at start-up, so that a run can be repeated bit for bit on
# the same GPU and version of cuBLAS. In fp32, and on a CPU, torch's own product is taken, and rank means nothing.
#
# Operands are bf16; or fp8, each with units on the device that its numbers are multiplied by.

WORKSPACE_BYTES = 64 << 20
PROPOSALS = 8
#: cudaDataType_t.
TYPES = {torch.float32: 0, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
#: cublasLtMatmulDescAttributes_t: the scales of cuBLASLt's A and B, which are our b and a, and how far one reaches.
A_SCALE, B_SCALE, A_SCALE_MODE, B_SCALE_MODE = 17, 18, 31, 32


class Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


@functools.cache
def blas() -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """cuBLASLt as torch loaded it, and a handle."""
    library = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}")
    handle = ctypes.c_void_p()
    check(library.cublasLtCreate(ctypes.byref(handle)))
    return library, handle


def check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"cuBLASLt answered status {status}")


@functools.cache
def workspace(stream: int) -> Tensor:
    """Scratch memory of its own for each stream, since products on two streams run at once."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")


@functools.cache
def one() -> Tensor:
    """The unit with which proposals are asked for."""
    return torch.ones((), dtype=torch.float32, device="cuda")


def describe(descriptor: ctypes.c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    check(blas()[0].cublasLtMatmulDescSetAttribute(descriptor, attribute, ctypes.byref(value), size))


@functools.cache
def prepared(
    sizes: tuple[int, int, int],
    strides: tuple[tuple[int, int], ...],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    fast: bool = False,
    modes: tuple[int, int] = (0, 0),
) -> tuple[ctypes.c_void_p, list[ctypes.c_void_p], list[Proposal]]:
    """Descriptor, layouts and proposals for out [M, N] = a [M, K] · b [K, N]; dtypes of a, b and out. cuBLASLt thinks
    in columns, so it is asked for outᵀ = bᵀ · aᵀ; an operand whose rows lie one after another is to it a transposed
    one, and is taken as it is. fast: fp8's sums are not promoted on the way. modes: of the units of a and b,
    cublasLtMatmulMatrixScale_t."""
    library, _ = blas()
    (m, n, k), (a_stride, b_stride, out_stride) = sizes, strides
    float32, compute_float32, transpose_a, transpose_b, fast_sum, workspace_limit = 0, 68, 3, 4, 25, 1

    def layout(dtype: torch.dtype, rows: int, cols: int, stride: tuple[int, int]) -> tuple[ctypes.c_void_p, bool]:
        by_rows = stride[1] == 1
        shape = (cols, rows, stride[0]) if by_rows else (rows, cols, stride[1])
        found = ctypes.c_void_p()
        check(library.cublasLtMatrixLayoutCreate(ctypes.byref(found), TYPES[dtype], *map(ctypes.c_int64, shape)))
        return found, not by_rows

    b_layout, b_turned = layout(dtypes[1], k, n, b_stride)
    a_layout, a_turned = layout(dtypes[0], m, k, a_stride)
    out_layout, _ = layout(dtypes[2], m, n, out_stride)
    descriptor, preference = ctypes.c_void_p(), ctypes.c_void_p()
    check(library.cublasLtMatmulDescCreate(ctypes.byref(descriptor), compute_float32, float32))
    for attribute, turned in ((transpose_a, b_turned), (transpose_b, a_turned)):
        describe(descriptor, attribute, ctypes.c_int32(int(turned)))
    if dtypes[0].itemsize == 1:
        describe(descriptor, fast_sum, ctypes.c_int8(int(fast)))
        for attribute in (A_SCALE, B_SCALE):
            describe(descriptor, attribute, ctypes.c_void_p(one().data_ptr()))
        if any(modes):  # which libraries before 12.9 do not know
            describe(descriptor, A_SCALE_MODE, ctypes.c_int32(modes[1]))
            describe(descriptor, B_SCALE_MODE, ctypes.c_int32(modes[0]))
    check(library.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)))
    limit = ctypes.c_uint64(WORKSPACE_BYTES)
    check(
        library.cublasLtMatmulPreferenceSetAttribute(
            preference, workspace_limit, ctypes.byref(limit), ctypes.c_size_t(8)
        )
    )
    proposals, count = (Proposal * PROPOSALS)(), ctypes.c_int()
    layouts = [b_layout, a_layout, out_layout]
    check(
        library.cublasLtMatmulAlgoGetHeuristic(
            blas()[1], descriptor, *layouts, out_layout, preference, PROPOSALS, proposals, ctypes.byref(count)
        )
    )
    check(library.cublasLtMatmulPreferenceDestroy(preference))
    if count.value == 0:
        raise RuntimeError(f"cuBLASLt has no algorithm for {m} x {k} x {n} of {dtypes} with strides {strides}")
    return descriptor, layouts, list(proposals[: count.value])


def product_(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    rank: int,
    alpha: float = 1.0,
    accumulate: bool = False,
    units: tuple[Tensor, Tensor] | None = None,
    fast: bool = False,
    modes: tuple[int, int] = (0, 0),
) -> Tensor:
    """out = alpha * a · b, or out += that; a and b are bf16, or fp8 with the units of both, fp32, whose shapes follow
    from their modes; out is bf16 or fp32."""
    library, handle = blas()
    sizes, strides = (a.shape[0], b.shape[1], a.shape[1]), (a.stride(), b.stride(), out.stride())
    dtypes = (a.dtype, b.dtype, out.dtype)
    descriptor, (b_layout, a_layout, out_layout), proposals = prepared(sizes, strides, dtypes, fast, modes)
    if units is not None:
        for attribute, unit in ((A_SCALE, units[1]), (B_SCALE, units[0])):
            describe(descriptor, attribute, ctypes.c_void_p(unit.data_ptr()))
    stream = torch.cuda.current_stream().cuda_stream
    scratch = workspace(stream)
    pointer = ctypes.c_void_p
    check(
        library.cublasLtMatmul(
            handle,
            descriptor,
            ctypes.byref(ctypes.c_float(alpha)),
            pointer(b.data_ptr()),
            b_layout,
            pointer(a.data_ptr()),
            a_layout,
            ctypes.byref(ctypes.c_float(1.0 if accumulate else 0.0)),
            pointer(out.data_ptr()),
            out_layout,
            pointer(out.data_ptr()),
            out_layout,
            ctypes.byref(proposals[min(rank, len(proposals) - 1)].algorithm),
            pointer(scratch.data_ptr()),
            ctypes.c_size_t(WORKSPACE_BYTES),
            pointer(stream),
        )
    )
    return out


def by_torch(x: Tensor) -> bool:
    return x.dtype == torch.float32 or not x.is_cuda


def linear_forward(x: Tensor, weight: Tensor, rank: int) -> Tensor:
    if by_torch(x):
        return torch.mm(x, weight.t())
    return product_(x.new_empty(x.shape[0], weight.shape[0]), x, weight.t(), rank)


def linear_input_grad(d_y: Tensor, weight: Tensor, rank: int, alpha: float = 1.0) -> Tensor:
    d_x = d_y.new_empty(d_y.shape[0], weight.shape[1])
    if by_torch(d_y):
        return torch.addmm(d_x, d_y, weight, beta=0.0, alpha=alpha, out=d_x)
    return product_(d_x, d_y, weight, rank, alpha)


def linear_weight_grad_(grad: Tensor, d_y: Tensor, x: Tensor, rank: int, alpha: float = 1.0) -> None:
    """Adds alpha * d_yᵀ · x to grad."""
    if by_torch(x):
        torch.addmm(grad, d_y.t().float(), x.float(), alpha=alpha, out=grad)
    else:
        product_(grad, d_y.t(), x, rank, alpha, accumulate=True)


# Embedding: gather and scale; backward adds each token's rows in a fixed order into the fp32 gradient.
#
# x = table[tokens] * scale, tokens int64 [T], table [V, D], x [T, D] in the table's dtype. Backward sorts the tokens
# (stable), and the program at the first of each run of equal tokens adds the run's rows: no atomics, so the same bits
# every time. Sums are fp32.


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


# Residual add and RMSNorm in one pass: each row is read once, its sum and its norm are written once.
#
#     sum = x + branch * branch_scale            y = sum / sqrt(mean(sum²) + eps) * weight * out_scale
#
# (RMSNorm: arXiv 1910.07467.) x, branch, sum, y are [T, D] in the activations' dtype, weight [D] in the weights'
# dtype, rstd [T] fp32. Arithmetic and sums are fp32; the norm is taken of the rounded sum, which is what backward reads
# again. Backward leaves each program's share of the weight's gradient in fp32 partials, which ``norm_weight_grad_``
# adds in a fixed order: no atomics, so the same bits every time. Where ``largest`` is given, int32 [SLOTS], the largest
# magnitude of y, or of the gradient, is noted there.

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


# RoPE (arXiv 2104.09864, halves rotated as in Llama) on the packed product of the attention's input.
#
# qkv is [T, (H + 2G) * K]: all query heads, then key heads, then value heads. Forward turns queries and keys where
# they lie. Backward turns the gradients that attention left back: where they lie too, or, if they are three tensors,
# packing them, dv included, in the same pass. Tables are cos and sin [S, K / 2] in fp32, arithmetic is fp32 and rounds
# once. A token's position is its index modulo S, less where in its row its document begins if that is given: ``first``
# [T], int32.
#
#     first' = first * cos - second * sin        second' = second * cos + first * sin


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


# Causal attention through cuDNN, called by name: PyTorch's own choice on Hopper is FlashAttention-2, which is slower.
#
# qkv is [T, (H + 2G) * K] as RoPE leaves it; queries, keys and values are views of it, and no head is copied. The
# context is [T, H * K]. cuDNN takes bf16, accumulates in fp32 and keeps the rows' log-sum-exp for backward. In fp32,
# which cuDNN does not have, and on a CPU, the formula softmax(q kᵀ / sqrt(K)) v is written out instead, in fp32, and
# rounded once.


def split_heads(qkv: Tensor, rows: int, heads: int, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, H, S, K], k and v [N, G, S, K], as views of qkv."""
    packed = qkv.view(rows, -1, heads + 2 * groups, head_dim).transpose(1, 2)
    q, k, v = packed.split([heads, groups, groups], dim=1)
    return q, k, v


def cudnn_attention_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple]:
    """Returns the context [N, H, S, K], laid out [N, S, H, K] in memory as q is, and what backward needs."""
    out, lse, _, _, max_q, max_k, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=q.shape[-1] ** -0.5
    )
    return out, (q, k, v, out, lse, seed, offset, max_q, max_k)


def cudnn_attention_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse, seed, offset, max_q, max_k = saved
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        d_out, q, k, v, out, lse, seed, offset, None, None, None, max_q, max_k, 0.0, True, scale=q.shape[-1] ** -0.5
    )


def exact_attention_forward(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> tuple[Tensor, tuple]:
    """``first``, int32 [N * S]: where in its row the document begins beyond which a token does not look back."""
    dtype, (q, k, v) = q.dtype, (x.float() for x in (q, k, v))
    copies, length = q.shape[1] // k.shape[1], q.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if first is not None:
        hidden = hidden | (torch.arange(length, device=q.device) < first.view(-1, 1, length, 1))
    scores = (q @ k.repeat_interleave(copies, 1).mT) * q.shape[-1] ** -0.5
    p = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
    out = (p @ v.repeat_interleave(copies, 1)).to(dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), (q, k, v, p)


def exact_attention_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (q, k, v, p), dtype, d_out = saved, d_out.dtype, d_out.float()
    copies = q.shape[1] // k.shape[1]
    d_v = p.mT @ d_out
    d_p = d_out @ v.repeat_interleave(copies, 1).mT
    d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    d_q = d_scores @ k.repeat_interleave(copies, 1)
    d_k = d_scores.mT @ q
    groups = (q.shape[0], k.shape[1], copies, *q.shape[2:])
    return d_q.to(dtype), d_k.reshape(groups).sum(2).to(dtype), d_v.reshape(groups).sum(2).to(dtype)


# SwiGLU (arXiv 2002.05202) on the packed product: gate_up [T, 2F] holds gates, then ups, or both in turns.
#
#     act = silu(gate) * up            d_up = d_act * silu(gate)
#     d_gate = d_act * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
#
# Arithmetic is fp32 and rounds once. Backward writes the gradient of gate_up over gate_up. Where ``largest`` is given,
# int32 [SLOTS], the largest magnitude of what is written is noted there.


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


# Cross-entropy and its gradient in place on the logits: two passes over a row, the second mostly from L2.
#
#     loss[t] = mask[t] / denominator * (logsumexp(logits[t]) - logits[t, label[t]])
#     d_logits[t] = mask[t] / denominator * (softmax(logits[t]) - onehot(label[t]))
#
# logits [T, V] in the activations' dtype, labels int64 [T], mask fp32 [T], denominator fp32 [], loss fp32 [T];
# arithmetic and sums are fp32, in base 2. The gradient overwrites the logits.

# As many programs as an H200 holds at once: more rows in work would push each other out of L2 between the passes.
PROGRAMS, LANES, WARPS = 264, 1024, 32


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, mask_ptr, denominator_ptr, loss_ptr, rows,
    V: tl.constexpr, LANES: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    LOG2_E = 1.4426950408889634
    col = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_ptr = logits_ptr + tl.cast(row, tl.int64) * V
        label = tl.load(labels_ptr + row)
        weight = tl.load(mask_ptr + row) / tl.load(denominator_ptr)
        # Read before the reductions below, whose barriers keep every thread from overwriting it too early.
        chosen = tl.load(row_ptr + label).to(tl.float32)
        # Each lane keeps its own maximum and sum over groups of eight, so that no turn of the loop waits for another.
        largest = tl.full([LANES], -1e30, dtype=tl.float32)
        total = tl.zeros([LANES], dtype=tl.float32)
        for start in range(0, V, LANES * 8):
            inside = start + col < V
            x = tl.load(row_ptr + start + col, mask=inside, other=-float("inf"), eviction_policy="evict_last")
            x = x.to(tl.float32) * LOG2_E
            higher = tl.maximum(largest, tl.max(x, axis=1))
            total = total * tl.exp2(largest - higher) + tl.sum(tl.exp2(x - higher[:, None]), axis=1)
            largest = higher
        most = tl.max(largest, axis=0)
        log_sum = most + tl.log2(tl.sum(total * tl.exp2(largest - most), axis=0))
        tl.store(loss_ptr + row, weight * (log_sum / LOG2_E - chosen))
        if GRADIENT:
            for start in range(0, V, LANES * 8):
                inside = start + col < V
                x = tl.load(row_ptr + start + col, mask=inside, other=-float("inf"), eviction_policy="evict_first")
                x = x.to(tl.float32) * LOG2_E
                d_x = weight * (tl.exp2(x - log_sum) - tl.where(start + col == label, 1.0, 0.0))
                tl.store(row_ptr + start + col, d_x, mask=inside, eviction_policy="evict_first")


def cross_entropy_(logits: Tensor, labels: Tensor, mask: Tensor, denominator: Tensor, gradient: bool) -> Tensor:
    """Returns the rows' losses [T]; with ``gradient`` the logits become their own gradient."""
    rows, vocab = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    cross_entropy_kernel[(min(PROGRAMS, rows),)](
        logits, labels, mask, denominator, loss, rows,
        V=vocab, LANES=LANES, GRADIENT=gradient, num_warps=WARPS,
    )  # fmt: skip
    return loss


# Gradient norm, clipping and AdamW (arXiv 1711.05101) over flat buffers; nothing comes to the host.
#
# The norm is sqrt(sum of squares) over the whole flat gradient, by fixed partial sums. If it is not finite,
# ``applied`` is false and no parameter, moment or counter moves. Else, as torch.optim.AdamW and clip_grad_norm_:
#
#     g = grad * min(1, clip / (norm + 1e-6))
#     master *= 1 - lr * decay (matrices only)       m += (g - m) * (1 - beta1)       v = beta2 * v + (1 - beta2) * g²
#     master -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)          weight = round(master)
#
# Everything is fp32 but the weight, which has the activations' dtype, and t and the powers, which are taken in fp64.

NORM_PARTS = 1056  # programs that sum squares, at most: eight on each of an H200's multiprocessors


@triton.jit
def square_sum_kernel(grad_ptr, part_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, stride):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < count, other=0.0)
        total += grad * grad
    tl.store(part_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def adamw_kernel(
    grad_ptr, master_ptr, m_ptr, v_ptr, weight_ptr, scalars_ptr, count, decayed, beta1, beta2, eps, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    clip = tl.load(scalars_ptr)
    shrink = tl.load(scalars_ptr + 1)
    rate = tl.load(scalars_ptr + 2)
    root = tl.load(scalars_ptr + 3)
    applied = tl.load(scalars_ptr + 4)
    if applied != 0.0:
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * clip
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        master = tl.load(master_ptr + at, mask=inside, other=0.0)
        m += (grad - m) * (1.0 - beta1)
        v = v * beta2 + grad * grad * (1.0 - beta2)
        master *= tl.where(at < decayed, shrink, 1.0)
        master -= rate * (m / (tl.sqrt(v) / root + eps))
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        tl.store(master_ptr + at, master, mask=inside)
        tl.store(weight_ptr + at, master, mask=inside)


def grad_norm(grad: Tensor) -> Tensor:
    """sqrt of the sum of squares of a flat fp32 buffer, fp32 []."""
    programs = min(NORM_PARTS, -(-grad.numel() // 2048))
    parts = torch.empty(programs, dtype=torch.float32, device=grad.device)
    square_sum_kernel[(programs,)](grad, parts, grad.numel(), BLOCK=2048, num_warps=8)
    return parts.double().sum().sqrt().float()


def adamw_(
    flat: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    decayed: int,
    step: Tensor,
    lr: Tensor,
    norm: Tensor,
    clip: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """One update of flat = (grad, master, m, v, weight), whose first ``decayed`` elements are matrices.

    step int64 [] and lr fp64 [] live on the device; step is advanced. Returns applied, bool [].
    """
    grad, master, m, v, weight = flat
    applied = torch.isfinite(norm)
    step += applied
    t = step.double()
    scalars = torch.stack(
        [
            (clip / (norm.double() + 1e-6)).clamp(max=1.0),
            1.0 - lr * weight_decay,
            lr / (1.0 - betas[0] ** t),
            (1.0 - betas[1] ** t).sqrt(),
            applied.double(),
        ]
    ).float()
    count = grad.numel()
    adamw_kernel[(triton.cdiv(count, 1024),)](
        grad, master, m, v, weight, scalars, count, decayed, betas[0], betas[1], eps, BLOCK=1024, num_warps=4
    )
    return applied


# Products of fp8 operands, whose numbers are scaled by units of whole tensors or of blocks.
#
#     number = round(x / unit)        y = the sum of unit_x * unit_w * (x's number * w's), in fp32, rounded once to bf16
#
# A unit is the power of two that puts the largest magnitude it is for into the top of the type's range, (max / 2, max]:
# scaling rounds nothing, and no history is kept, so a resumed run has nothing to restore. Where that holds what is not
# finite its unit is NaN, and so is all that follows. How far a unit reaches is ``fp8_tensor``'s and ``fp8_block``'s.
#
# Hopper multiplies fp8 only along rows of both operands. So an operand is written twice, as it lies and turned: forward
# reads the rows of x and of the weight, the input's gradient the rows of d_y and the turned weight, the gradient of the
# weight d_y and x turned. In fp32, the gates' exact mode, operands are plain tensors and products those of ``linear``.

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
    thread, and byte by byte that takes four times as many steps. bits: BITS, not known to compilers, since of a
    constant they make what ptxas 12.8 dies of."""
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
    row, again = 4 * word.to(tl.int64), scale * one
    store_four(
        rows_ptr, (a * scale).to(kind), (b * scale).to(kind), (c * scale).to(kind), (d * scale).to(kind),
        row, col, rows, cols,
    )  # fmt: skip
    a, b, c, d = (a * again).to(kind), (b * again).to(kind), (c * again).to(kind), (d * again).to(kind)
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


# Operands in fp8 with one unit of a whole tensor, from its own largest magnitude of now (tensorwise, "current"
# scaling).
#
# Activations and weights are e4m3, gradients e5m2. The largest magnitude is known before anything is rounded: kernels
# note it as they write, or a pass of its own finds it.

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
    first = part * rows * cols, part * cols * words
    store_both(rows_ptr + first[0], turned_ptr + first[1], a, b, c, d, scale, word, col, rows, cols, words, bits, one)
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


# Causal attention by FlashAttention-4 (the package flash-attn-4), whose kernels for Hopper are faster than cuDNN's.
#
# Its two functions are called without its autograd: backward writes the gradients of queries, keys and values where
# they lie in the gradient of qkv [T, (H + 2G) * K], so that nothing packs them later. It takes bf16, accumulates in
# fp32, and adds up the gradient of a query in whatever order its blocks come.


@functools.cache
def flash_kernels() -> tuple[Callable, Callable]:
    """Forward and backward. Raises ImportError, with the remedy, where the package is missing."""
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # pyright: ignore
    except ImportError as error:
        raise ImportError(f"FlashAttention-4 is missing ({error}): pip install 'forgetrain[hopper]'") from error
    return _flash_attn_fwd, _flash_attn_bwd


def flash_attention_forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None) -> tuple[Tensor, tuple]:
    """Returns the context [N, H, S, K], laid out [N, S, H, K] in memory as q is, and what backward needs.

    ``documents``: int32, ascending boundaries in the N * S tokens beyond which no token looks, also those of the rows.
    One that repeats is a document without tokens, so that their number can be fixed."""
    forward, _ = flash_kernels()
    rows, heads, length, width = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = {"softmax_scale": width**-0.5, "causal": True}
    if documents is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), documents)
        options |= dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), length)
    # a block of several query heads is the faster for narrow heads, and the slower for wide ones
    out, lse = forward(q, k, v, return_lse=True, pack_gqa=width < 128, **options)[:2]
    return out.view(rows, length, heads, width).transpose(1, 2), (q, k, v, out, lse, options)


def flash_attention_backward(saved: tuple, d_out: Tensor) -> Tensor:
    """d_out [N, H, S, K], laid out as the context. Returns the gradient of qkv as RoPE left it, [T, (H + 2G) * K]."""
    _, backward = flash_kernels()
    q, k, v, out, lse, options = saved
    heads, groups, width = q.shape[-2], k.shape[-2], q.shape[-1]
    d_qkv = torch.empty(*q.shape[:-2], heads + 2 * groups, width, dtype=q.dtype, device=q.device)
    d_q, d_k, d_v = d_qkv.split([heads, groups, groups], dim=-2)
    backward(q, k, v, out, d_out.transpose(1, 2).reshape(out.shape), lse, dq=d_q, dk=d_k, dv=d_v, **options)
    return d_qkv.view(-1, (heads + 2 * groups) * width)


# ---------------------------------------------------------------------------------------------------------------------
# Weights: one flat buffer each for weights and gradients; matrices, which decay, lie before vectors.
# Each rank keeps the masters and moments of one part of it alone, whole rows of whole matrices but at its edges.


def stored_shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors that this engine keeps, in the order of the flat buffers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes[layer + "self_attn.qkv_proj.weight"] = (Q_WIDTH + 2 * KV_WIDTH, HIDDEN)
        shapes[layer + "self_attn.o_proj.weight"] = (HIDDEN, Q_WIDTH)
        shapes[layer + "mlp.gate_up_proj.weight"] = (2 * INTERMEDIATE, HIDDEN)
        shapes[layer + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes


def canonical_views(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors under canonical names, as views."""
    views = {}
    for name, tensor in stored.items():
        if ".qkv_proj." in name:
            for part, rows in zip("qkv", tensor.split([Q_WIDTH, KV_WIDTH, KV_WIDTH]), strict=True):
                views[name.replace(".qkv_proj.", f".{part}_proj.")] = rows
        elif ".gate_up_proj." in name:
            for part, rows in zip(("gate", "up"), tensor.split(INTERMEDIATE), strict=True):
                views[name.replace(".gate_up_proj.", f".{part}_proj.")] = rows
        else:
            views[name] = tensor
    return views


class Flat:
    """A flat buffer and its stored tensors as views."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        shapes = stored_shapes()
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), device=device, dtype=dtype)
        parts = self.flat.split(sizes)
        self.stored = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        self.decayed = sum(size for size, shape in zip(sizes, shapes.values(), strict=True) if len(shape) > 1)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name]

    def norms(self) -> Tensor:
        """The norms' vectors, in the order of the layers, as one view [2 * LAYERS + 1, D]."""
        return self.flat[self.decayed :].view(2 * LAYERS + 1, HIDDEN)


def part_bounds(ranks: int) -> list[int]:
    """Where each rank's part of the flat buffers begins, and the end: even parts, but no row is cut."""
    layout = Flat("meta", torch.float32)
    bounds = [rank * layout.flat.numel() // ranks for rank in range(ranks + 1)]
    for tensor in layout.stored.values():
        start, width = tensor.storage_offset(), tensor[0].numel()
        end = start + tensor.numel()
        bounds = [at - (at - start) % width if start <= at < end else at for at in bounds]
    return bounds


class Place(NamedTuple):
    """What a rank keeps of a parameter: where in its flat states, and where in the whole parameter."""

    start: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """It, as a view of a flat state."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.start)


def places(start: int, end: int) -> dict[str, Place]:
    """Canonical name → the rows of it that lie between ``start`` and ``end`` of the flat buffers, if any."""
    found = {}
    for name, view in canonical_views(Flat("meta", torch.float32).stored).items():
        offset, stride, rows = view.storage_offset(), view.stride(0), view.shape[0]
        first, last = (min(max(-((offset - at) // stride), 0), rows) for at in (start, end))  # rounded up
        if first < last:
            begin, other = offset + first * stride - start, tuple(view.shape[1:])
            kept = (begin, view.stride(), (last - first, *other))
            found[name] = Place(*kept, tuple(view.shape), (first,) + (0,) * len(other))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The engine.


class StepResult(NamedTuple):
    loss: Tensor
    grad_norm: Tensor
    applied: Tensor


class Shard(NamedTuple):
    tensor: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


#: The fp8 operands of a layer: activations, then the gradients of what products give.
OPERANDS = ("normed1", "context", "normed2", "activated", "d_down", "d_gate_up", "d_o", "d_qkv")
#: The layers' matrices, which are products' other operands.
MATRICES = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


class MicroBatch(NamedTuple):
    """Tensors at fixed addresses, because a CUDA graph reads them."""

    tokens: Tensor  # int64 [N, S]
    labels: Tensor  # int64 [N, S]
    mask: Tensor  # float32 [N, S]
    cos: Tensor  # float32 [S, K / 2]
    sin: Tensor
    partials: Tensor  # float32 [2 * LAYERS + 1, programs, D]: shares of the norms' gradients
    largest: Tensor  # int32 [LAYERS, operands, SLOTS]: largest magnitudes


class Kept(NamedTuple):
    """What a layer's backward pass reads."""

    x: Tensor  # the layer's input, [T, D]
    rstd1: Tensor  # [T]
    normed1: Fp8 | Tensor
    attention: tuple
    context: Fp8 | Tensor  # [T, Q_WIDTH]
    middle: Tensor  # after attention's residual, [T, D]
    rstd2: Tensor
    normed2: Fp8 | Tensor
    gate_up: Tensor  # [T, 2F]
    activated: Fp8 | Tensor  # [T, F]

    def for_backward(self) -> Kept:
        """Without the rows of fp8 operands, which forward alone reads."""
        return self._replace(**{k: x.for_backward() for k, x in self._asdict().items() if isinstance(x, Fp8)})


class Engine:
    def __init__(self, recipe: Mapping[str, Any], device: str, dtype: torch.dtype, group: Any) -> None:
        self.recipe, self.device, self.dtype, self.group = recipe, device, dtype, group
        self.plain = dtype == torch.float32 or device == "cpu"  # attention by its formula
        self.weight, self.grad = Flat(device, dtype), Flat(device, torch.float32)
        self.bounds = part_bounds(1 if group is None else dist.get_world_size(group))
        rank = 0 if group is None else dist.get_rank(group)
        self.own = slice(self.bounds[rank], self.bounds[rank + 1])
        own = self.weight.flat[self.own]
        self.master = own if dtype == torch.float32 else torch.zeros_like(own, dtype=torch.float32)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.places = places(self.own.start, self.own.stop)
        self.fp8 = dtype != torch.float32
        self.matrices = self.make_matrices() if self.fp8 else {}
        self.updates = torch.zeros((), dtype=torch.int64, device=device)
        self.denominator = torch.ones((), dtype=torch.float32, device=device)
        self.total = torch.zeros((), dtype=torch.float32, device=device)
        self.micro: dict[tuple[int, ...], MicroBatch] = {}  # by rows, positions
        self.graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    # Forward.

    def trunk(self, micro: MicroBatch, kept: list[Kept] | None) -> tuple[Tensor, Tensor, Tensor]:
        """The last residual stream, its norm times HEAD_SCALE and the norm's rstd; layers append what they keep."""
        w = self.weight
        x = embedding_forward(micro.tokens.view(-1), w["model.embed_tokens.weight"], EMBEDDING_SCALE)
        micro.largest.zero_()
        first = self.largest(micro, 0, "normed1")
        x, normed, rstd = add_norm_forward(x, None, w["model.layers.0.input_layernorm.weight"], EPS, largest=first)
        for i in range(LAYERS):
            layer = self.layer(i, f"model.layers.{i}.", x, normed, rstd, micro)
            last = i + 1 == LAYERS
            following = w["model.norm.weight" if last else f"model.layers.{i + 1}.input_layernorm.weight"]
            down = self.matrix(f"model.layers.{i}.mlp.down_proj.weight")
            branch = fp8_forward(layer.activated, down, rank=4)
            if kept is not None:
                kept.append(layer.for_backward())
            scale = HEAD_SCALE if last else 1.0
            largest = None if last else self.largest(micro, i + 1, "normed1")
            x, normed, rstd = add_norm_forward(layer.middle, branch, following, EPS, RESIDUAL_SCALE, scale, largest)
        return x, normed, rstd

    def layer(self, i: int, layer: str, x: Tensor, normed1: Tensor, rstd1: Tensor, micro: MicroBatch) -> Kept:
        """From the normed input to the input of the down projection."""
        w, rows = self.weight, micro.tokens.shape[0]
        normed1 = self.operand(normed1, micro, i, "normed1")
        qkv = fp8_forward(normed1, self.matrix(layer + "self_attn.qkv_proj.weight"), rank=5)
        rope_forward_(qkv, micro.cos, micro.sin, HEADS, GROUPS, HEAD_DIM)
        heads = split_heads(qkv, rows, HEADS, GROUPS, HEAD_DIM)
        forward = exact_attention_forward if self.plain else flash_attention_forward
        out, attention = forward(*heads)
        context = out.transpose(1, 2).view(-1, Q_WIDTH)
        context = self.operand(context, micro, i, "context", found=False)
        branch = fp8_forward(context, self.matrix(layer + "self_attn.o_proj.weight"), rank=3)
        norm = w[layer + "post_attention_layernorm.weight"]
        largest = self.largest(micro, i, "normed2")
        middle, normed2, rstd2 = add_norm_forward(x, branch, norm, EPS, RESIDUAL_SCALE, largest=largest)
        normed2 = self.operand(normed2, micro, i, "normed2")
        gate_up = fp8_forward(normed2, self.matrix(layer + "mlp.gate_up_proj.weight"), rank=7)
        activated = swiglu_forward(gate_up, largest=self.largest(micro, i, "activated"))
        activated = self.operand(activated, micro, i, "activated")
        return Kept(x, rstd1, normed1, attention, context, middle, rstd2, normed2, gate_up, activated)

    # Operands of the layers' products: in fp8, but in the exact mode, where they are the tensors themselves.

    def make_matrices(self) -> dict[str, Fp8]:
        """Room for the layers' matrices in fp8, those of a kind in one stack, [LAYERS, rows, columns]."""
        shapes = {kind: stored_shapes()[f"model.layers.0.{kind}.weight"] for kind in MATRICES}
        return {kind: empty_fp8((LAYERS, *shape), E4M3, self.device) for kind, shape in shapes.items()}

    def round_matrices(self) -> None:
        """From the weights as they are now."""
        for kind, out in self.matrices.items():
            first, second = (self.weight[f"model.layers.{i}.{kind}.weight"] for i in (0, min(1, LAYERS - 1)))
            between = second.storage_offset() - first.storage_offset()
            stack = first.as_strided((LAYERS, *first.shape), (between, *first.stride()))
            largest = torch.zeros(LAYERS, SLOTS, dtype=torch.int32, device=self.device)
            quantise_(stack, find_largest_(stack, largest), out)

    def matrix(self, name: str) -> Fp8 | Tensor:
        if not self.fp8:
            return self.weight[name]
        _, _, i, kind = name.removesuffix(".weight").split(".", 3)
        return self.matrices[kind].part(int(i))

    def largest(self, micro: MicroBatch, i: int, which: str) -> Tensor | None:
        """Where a kernel notes the largest magnitude of this operand of the i-th layer."""
        return micro.largest[i, OPERANDS.index(which)] if self.fp8 else None

    def operand(self, x: Tensor, micro: MicroBatch, i: int, which: str, found: bool = True) -> Fp8 | Tensor:
        """found: whether the kernel that wrote x has noted its largest magnitude."""
        largest = self.largest(micro, i, which)
        if largest is None:
            return x
        return quantise(x, largest if found else find_largest_(x, largest), gradient=which.startswith("d_"))

    def head(self, normed: Tensor, micro: MicroBatch, gradient: bool) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss, fp32 [], and the logits, which are their own gradient if asked for."""
        logits = linear_forward(normed, self.weight["lm_head.weight"], rank=1)
        losses = cross_entropy_(logits, micro.labels.view(-1), micro.mask.view(-1), self.denominator, gradient)
        return losses.sum(), logits

    # Backward: gradients are added to the flat buffer as they come.

    def micro_step(self, micro: MicroBatch) -> None:
        """Forward and backward of one micro-batch; adds its share of the loss to the total."""
        w, kept = self.weight, []
        x, normed, rstd = self.trunk(micro, kept)
        loss, d_logits = self.head(normed, micro, gradient=True)
        self.total += loss
        linear_weight_grad_(self.grad["lm_head.weight"], d_logits, normed, rank=0)
        d_normed = linear_input_grad(d_logits, w["lm_head.weight"], rank=1)
        del d_logits, normed
        final = (x, rstd, w["model.norm.weight"])
        largest = self.largest(micro, LAYERS - 1, "d_down")
        dx = add_norm_backward(final, d_normed, None, micro.partials[2 * LAYERS], HEAD_SCALE, largest)
        for i in reversed(range(LAYERS)):
            dx = self.layer_backward(i, dx, kept.pop(), micro)
        embedding_backward_(micro.tokens.view(-1), dx, self.grad["model.embed_tokens.weight"], EMBEDDING_SCALE)
        norm_weight_grad_(micro.partials, self.grad.norms())

    def layer_backward(self, i: int, dx: Tensor, kept: Kept, micro: MicroBatch) -> Tensor:
        """The gradient of the layer's input, [T, D], from that of its output."""
        w, rows = self.weight, micro.tokens.shape[0]
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        d_down = self.operand(dx, micro, i, "d_down")
        self.weight_grad(mlp + "down_proj.weight", d_down, kept.activated, rank=1, alpha=RESIDUAL_SCALE)
        d_activated = fp8_input_grad(d_down, self.matrix(mlp + "down_proj.weight"), rank=0, alpha=RESIDUAL_SCALE)
        d_gate_up = swiglu_backward_(kept.gate_up, d_activated, largest=self.largest(micro, i, "d_gate_up"))
        d_gate_up = self.operand(d_gate_up, micro, i, "d_gate_up")
        self.weight_grad(mlp + "gate_up_proj.weight", d_gate_up, kept.normed2, rank=0)
        d_normed = fp8_input_grad(d_gate_up, self.matrix(mlp + "gate_up_proj.weight"), rank=0)
        norm = w[f"model.layers.{i}.post_attention_layernorm.weight"]
        middle, largest = (kept.middle, kept.rstd2, norm), self.largest(micro, i, "d_o")
        dx = add_norm_backward(middle, d_normed, dx, micro.partials[2 * i + 1], largest=largest)
        d_o = self.operand(dx, micro, i, "d_o")

        self.weight_grad(attn + "o_proj.weight", d_o, kept.context, rank=0, alpha=RESIDUAL_SCALE)
        d_context = fp8_input_grad(d_o, self.matrix(attn + "o_proj.weight"), rank=0, alpha=RESIDUAL_SCALE)
        d_out = d_context.view(rows, -1, HEADS, HEAD_DIM).transpose(1, 2)
        d_qkv = self.attention_backward(kept.attention, d_out, micro)
        d_qkv = self.operand(d_qkv, micro, i, "d_qkv", found=False)
        self.weight_grad(attn + "qkv_proj.weight", d_qkv, kept.normed1, rank=0)
        d_normed = fp8_input_grad(d_qkv, self.matrix(attn + "qkv_proj.weight"), rank=0)
        norm = w[f"model.layers.{i}.input_layernorm.weight"]
        largest = None if i == 0 else self.largest(micro, i - 1, "d_down")
        return add_norm_backward((kept.x, kept.rstd1, norm), d_normed, dx, micro.partials[2 * i], largest=largest)

    def attention_backward(self, saved: tuple, d_out: Tensor, micro: MicroBatch) -> Tensor:
        """The gradient of the packed product, [T, Q_WIDTH + 2 * KV_WIDTH], from that of the context [N, H, S, K]."""
        if not self.plain:
            d_qkv = flash_attention_backward(saved, d_out)
            return rope_backward_(d_qkv, micro.cos, micro.sin, HEADS, GROUPS, HEAD_DIM)
        backward = exact_attention_backward
        d_q, d_k, d_v = (d.transpose(1, 2).flatten(2).flatten(0, 1) for d in backward(saved, d_out))
        return rope_backward(d_q, d_k, d_v, micro.cos, micro.sin, GROUPS, HEAD_DIM)

    def weight_grad(self, name: str, d_y: Fp8 | Tensor, x: Fp8 | Tensor, rank: int, alpha: float = 1.0) -> None:
        fp8_weight_grad_(self.grad[name], d_y, x, rank, alpha)

    # One step: micro-batches, reduction, clipping, update. Nothing here waits for the device.

    @torch.no_grad()
    def step(self, batch: Any, lr: float) -> StepResult:
        self.round_matrices()
        micro_batches = self.micro_batches(batch)
        for key in {key for _, key in micro_batches}:
            self.prepare(key)
        self.grad.flat.zero_()
        self.total.zero_()
        self.denominator.copy_(batch.loss_denominator)
        for part, key in micro_batches:
            micro = self.fill(batch, part, key)
            graph = self.graphs.get(key)
            if graph is None:
                self.micro_step(micro)
            else:
                graph.replay()
        loss = self.total.clone()
        self.reduce_gradients()
        grad = self.grad.flat[self.own]
        norm = grad_norm(grad)
        if self.group is not None:
            sums = torch.stack([loss.double(), norm.double() ** 2])
            dist.all_reduce(sums, group=self.group)
            loss, norm = sums[0].float(), sums[1].sqrt().float()
        r = self.recipe
        buffers = (grad, self.master, self.exp_avg, self.exp_avg_sq, self.weight.flat[self.own])
        rate = torch.full((), lr, dtype=torch.float64, device=self.device)
        betas = (r["beta1"], r["beta2"])
        decayed = min(max(self.weight.decayed - self.own.start, 0), grad.numel())
        applied = adamw_(buffers, decayed, self.updates, rate, norm, r["clip"], betas, r["eps"], r["weight_decay"])
        self.publish_weights()
        return StepResult(loss, norm, applied)

    # Between ranks: each part of the gradients goes to the rank that keeps its states, and its new weights come back.

    def reduce_gradients(self) -> None:
        if self.group is not None:
            parts = [(rank, self.grad.flat[part]) for rank, part in self.parts()]
            self.finish([dist.reduce(part, group_dst=to, group=self.group, async_op=True) for to, part in parts])

    def publish_weights(self) -> None:
        if self.group is not None:
            parts = [(rank, self.weight.flat[part]) for rank, part in self.parts()]
            self.finish([dist.broadcast(part, group_src=of, group=self.group, async_op=True) for of, part in parts])

    def parts(self) -> list[tuple[int, slice]]:
        """(rank, what of the flat buffers it keeps)."""
        return [(rank, slice(*self.bounds[rank : rank + 2])) for rank in range(len(self.bounds) - 1)]

    def finish(self, works: list) -> None:
        """On a GPU the stream waits, not the host."""
        for work in works:
            work.wait()

    def micro_batches(self, batch: Any) -> list[tuple[slice, tuple[int, ...]]]:
        """The rows of each micro-batch, and the key of its tensors and its graph."""
        rows = self.recipe["micro_batch_size"]
        parts = [slice(start, start + rows) for start in range(0, batch.tokens.shape[0], rows)]
        return [(part, (*batch.tokens[part].shape,)) for part in parts]

    def buffers(self, key: tuple[int, ...]) -> MicroBatch:
        """The tensors of a micro-batch of this shape, made once; their addresses are what a graph reads."""
        if key not in self.micro:
            rows, length = key
            cos, sin = rope_tables(length, HEAD_DIM, ROPE_THETA, self.device)
            programs = min(NORM_PROGRAMS, rows * length)
            self.micro[key] = MicroBatch(
                torch.zeros(rows, length, dtype=torch.int64, device=self.device),
                torch.zeros(rows, length, dtype=torch.int64, device=self.device),
                torch.zeros(rows, length, dtype=torch.float32, device=self.device),
                cos,
                sin,
                torch.empty(2 * LAYERS + 1, programs, HIDDEN, dtype=torch.float32, device=self.device),
                torch.zeros(LAYERS, len(OPERANDS), SLOTS, dtype=torch.int32, device=self.device),
            )
        return self.micro[key]

    def fill(self, batch: Any, part: slice, key: tuple[int, ...]) -> MicroBatch:
        """These rows, copied to the addresses that their graph reads."""
        micro = self.buffers(key)
        micro.tokens.copy_(batch.tokens[part], non_blocking=True)
        micro.labels.copy_(batch.labels[part], non_blocking=True)
        micro.mask.copy_(batch.mask[part], non_blocking=True)
        return micro

    def prepare(self, key: tuple[int, ...]) -> None:
        """Captures a micro-batch of this shape as a CUDA graph, once; the kernels are compiled on the way."""
        if key in self.graphs or not self.weight.flat.is_cuda:
            return
        micro = self.buffers(key)
        micro.mask.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.micro_step(micro)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.micro_step(micro)
        self.graphs[key] = graph

    def release(self) -> None:
        """Gives back the memory of the captured micro-batches, which is most of it; the next step captures anew."""
        self.graphs.clear()
        torch.cuda.empty_cache()

    @torch.no_grad()
    def loss(self, batch: Any) -> Tensor:
        """The mean loss of this rank's rows over their mask."""
        self.denominator.copy_(batch.mask.sum())
        self.round_matrices()
        shares = []
        for part, key in self.micro_batches(batch):
            micro = self.fill(batch, part, key)
            shares.append(self.head(self.trunk(micro, None)[1], micro, gradient=False)[0])
        return torch.stack(shares).sum()

    # Weights and state.

    def load(self, weights: Mapping[str, Tensor]) -> None:
        views = canonical_views(self.weight.stored)
        if set(weights) != set(views):
            raise ValueError(f"weights do not fit this engine: {sorted(set(weights) ^ set(views))[:3]}")
        for name, view in views.items():
            view.copy_(weights[name].to(self.dtype))
        self.master.copy_(self.weight.flat[self.own])
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()
        self.updates.zero_()

    def states(self) -> dict[str, Tensor]:
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def state(self) -> dict[str, Shard]:
        shards = {
            f"{kind}/{name}": Shard(place.of(flat), place.global_shape, place.offsets)
            for kind, flat in self.states().items()
            for name, place in self.places.items()
        }
        return {**shards, "step": Shard(self.updates, (), ())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes whole tensors or pieces of them that hold at least what this rank keeps."""
        for kind, flat in self.states().items():
            for name, place in self.places.items():
                given, sizes = state[f"{kind}/{name}"], zip(place.offsets, place.shape, strict=True)
                box = tuple(slice(at - o, at - o + n) for (at, n), o in zip(sizes, given.offsets, strict=True))
                place.of(flat).copy_(given.tensor[box])
        self.updates.copy_(state["step"].tensor)
        self.weight.flat[self.own].copy_(self.master)
        self.publish_weights()


def build(target: Mapping[str, Any], *, device: str, precision: str, mesh: Any = None) -> Engine:
    """The one factory; ``target`` is a target's plain values and must be of the model this file was written for."""
    for key, value in MODEL.items():
        if target["model"][key] != value:
            raise ValueError(f"this engine is for model.{key} = {value!r}, the target has {target['model'][key]!r}")
    if target["data"]["documents"] != DOCUMENTS:
        raise ValueError(f"this engine is for data.documents = {DOCUMENTS!r}, got {target['data']['documents']!r}")
    check_device(torch.device(device), precision)
    if precision not in PRECISIONS:
        raise ValueError(f"this engine computes in {' and '.join(PRECISIONS)}, not in {precision}: write one that does")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Engine(target["recipe"], device, dtype, None if mesh is None else mesh.get_group())


def check_device(device: torch.device, precision: str) -> None:
    """Says in one line what is missing, before anything is compiled or allocated."""
    if device.type == "cpu":
        if not triton.knobs.runtime.interpret:
            raise ValueError("this engine is for a Hopper GPU; a CPU runs it with TRITON_INTERPRET=1, for tests")
        return
    if not torch.cuda.is_available():
        raise ValueError("this engine is for a Hopper GPU, and torch finds none: install a CUDA build and the driver")
    if torch.cuda.get_device_capability(device) != (9, 0):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"this engine is for a Hopper GPU (H100, H200), not for {name}: forge one for it")
    if precision != "fp32":
        for library in (flash_kernels,):
            try:
                library()
            except ImportError as error:
                raise ValueError(f"this engine needs more than torch: {error}") from error
