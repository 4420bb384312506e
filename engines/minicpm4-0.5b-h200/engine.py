"""A pre-training engine for minicpm4-0.5b-h200, written by ForgeTrain: forward, loss, backward, update.

Plan:
    schedule = hopper
    optimizer_state = replicated
    attention_library = flash4
    swiglu_library = quack
    weight_gradients = inline
    rank_qkv_forward = 6
    rank_qkv_input_grad = 5
    rank_qkv_weight_grad = 0
    rank_o_forward = 3
    rank_o_input_grad = 3
    rank_o_weight_grad = 0
    rank_gate_up_input_grad = 0
    rank_gate_up_weight_grad = 1
    rank_down_forward = 0
    rank_down_input_grad = 5
    rank_down_weight_grad = 0
    rank_head_forward = 1
    rank_head_input_grad = 0
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
PRECISIONS = ("fp32", "bf16")  # the first for gates
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


# SwiGLU (arXiv 2002.05202) in the epilogue of the product before it, by quack (the package quack-kernels).
#
#     gate_up = x · weightᵀ        act = silu(gate) * up
#
# Gates and ups alternate: row 2i of the weight [2F, D], and so column 2i of gate_up [T, 2F], is of gate i, the next of up
# i, so that one thread of the epilogue holds both. In bf16; the sum and SwiGLU are fp32 and round once.


@functools.cache
def gated_kernel() -> tuple[Callable, dict[str, Any]]:
    """The product, and how it runs: with the tile that was fastest at the GPU's power limit for both models measured.
    Raises ImportError, with the remedy, where the package is missing."""
    try:
        from quack.gemm_config import GemmConfig  # pyright: ignore
        from quack.gemm_interface import gemm_gated  # pyright: ignore
    except ImportError as error:
        raise ImportError(f"quack is missing ({error}): pip install 'forgetrain[hopper]'") from error
    tile = GemmConfig(tile_m=128, tile_n=192, pingpong=True, is_dynamic_persistent=False, cluster_m=2, cluster_n=1)
    return gemm_gated, {"activation": "swiglu", "config": tile, "dynamic_scheduler": False}


def gated_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, D] → gate_up [T, 2F] and act [T, F]."""
    product, options = gated_kernel()
    gate_up, act = (x.new_empty(x.shape[0], width) for width in (weight.shape[0], weight.shape[0] // 2))
    product(x, weight.t(), preact_out=gate_up, postact_out=act, **options)
    return gate_up, act


# ---------------------------------------------------------------------------------------------------------------------
# Weights: one flat buffer each for masters, gradients and moments; matrices, which decay, lie before vectors.


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
            for part, rows in zip(("gate", "up"), (tensor[0::2], tensor[1::2]), strict=True):
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


class MicroBatch(NamedTuple):
    """Tensors at fixed addresses, because a CUDA graph reads them."""

    tokens: Tensor  # int64 [N, S]
    labels: Tensor  # int64 [N, S]
    mask: Tensor  # float32 [N, S]
    cos: Tensor  # float32 [S, K / 2]
    sin: Tensor
    partials: Tensor  # float32 [2 * LAYERS + 1, programs, D]: shares of the norms' gradients


class Kept(NamedTuple):
    """What a layer's backward pass reads."""

    x: Tensor  # the layer's input, [T, D]
    rstd1: Tensor  # [T]
    normed1: Tensor
    attention: tuple
    context: Tensor  # [T, Q_WIDTH]
    middle: Tensor  # after attention's residual, [T, D]
    rstd2: Tensor
    normed2: Tensor
    gate_up: Tensor  # [T, 2F]
    activated: Tensor  # [T, F]


class Engine:
    def __init__(self, recipe: Mapping[str, Any], device: str, dtype: torch.dtype, group: Any) -> None:
        self.recipe, self.device, self.dtype, self.group = recipe, device, dtype, group
        self.plain = dtype == torch.float32 or device == "cpu"  # attention by its formula
        self.master, self.grad = Flat(device, torch.float32), Flat(device, torch.float32)
        self.exp_avg, self.exp_avg_sq = Flat(device, torch.float32), Flat(device, torch.float32)
        self.weight = self.master if dtype == torch.float32 else Flat(device, dtype)
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
        x, normed, rstd = add_norm_forward(x, None, w["model.layers.0.input_layernorm.weight"], EPS)
        for i in range(LAYERS):
            layer = self.layer(f"model.layers.{i}.", x, normed, rstd, micro)
            if kept is not None:
                kept.append(layer)
            last = i + 1 == LAYERS
            following = w["model.norm.weight" if last else f"model.layers.{i + 1}.input_layernorm.weight"]
            down = w[f"model.layers.{i}.mlp.down_proj.weight"]
            branch = linear_forward(layer.activated, down, rank=0)
            scale = HEAD_SCALE if last else 1.0
            x, normed, rstd = add_norm_forward(layer.middle, branch, following, EPS, RESIDUAL_SCALE, scale)
        return x, normed, rstd

    def layer(self, layer: str, x: Tensor, normed1: Tensor, rstd1: Tensor, micro: MicroBatch) -> Kept:
        """From the normed input to the input of the down projection."""
        w, rows = self.weight, micro.tokens.shape[0]
        qkv = linear_forward(normed1, w[layer + "self_attn.qkv_proj.weight"], rank=6)
        rope_forward_(qkv, micro.cos, micro.sin, HEADS, GROUPS, HEAD_DIM)
        heads = split_heads(qkv, rows, HEADS, GROUPS, HEAD_DIM)
        forward = exact_attention_forward if self.plain else flash_attention_forward
        out, attention = forward(*heads)
        context = out.transpose(1, 2).view(-1, Q_WIDTH)
        branch = linear_forward(context, w[layer + "self_attn.o_proj.weight"], rank=3)
        norm = w[layer + "post_attention_layernorm.weight"]
        middle, normed2, rstd2 = add_norm_forward(x, branch, norm, EPS, RESIDUAL_SCALE)
        gate_up, activated = self.mlp_forward(normed2, w[layer + "mlp.gate_up_proj.weight"])
        return Kept(x, rstd1, normed1, attention, context, middle, rstd2, normed2, gate_up, activated)

    def mlp_forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The product with gates and ups, [T, 2F], and SwiGLU of it, [T, F]."""
        if not self.plain:
            return gated_forward(x, weight)
        gate_up = linear_forward(x, weight, rank=0)
        return gate_up, swiglu_forward(gate_up, alternating=True)

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
        d_normed = linear_input_grad(d_logits, w["lm_head.weight"], rank=0)
        del d_logits, normed
        final = (x, rstd, w["model.norm.weight"])
        dx = add_norm_backward(final, d_normed, None, micro.partials[2 * LAYERS], HEAD_SCALE)
        for i in reversed(range(LAYERS)):
            dx = self.layer_backward(i, dx, kept.pop(), micro)
        embedding_backward_(micro.tokens.view(-1), dx, self.grad["model.embed_tokens.weight"], EMBEDDING_SCALE)
        norm_weight_grad_(micro.partials, self.grad.norms())

    def layer_backward(self, i: int, dx: Tensor, kept: Kept, micro: MicroBatch) -> Tensor:
        """The gradient of the layer's input, [T, D], from that of its output."""
        w, rows = self.weight, micro.tokens.shape[0]
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        self.weight_grad(mlp + "down_proj.weight", dx, kept.activated, rank=0, alpha=RESIDUAL_SCALE)
        d_activated = linear_input_grad(dx, w[mlp + "down_proj.weight"], rank=5, alpha=RESIDUAL_SCALE)
        d_gate_up = swiglu_backward_(kept.gate_up, d_activated, alternating=True)
        self.weight_grad(mlp + "gate_up_proj.weight", d_gate_up, kept.normed2, rank=1)
        d_normed = linear_input_grad(d_gate_up, w[mlp + "gate_up_proj.weight"], rank=0)
        norm = w[f"model.layers.{i}.post_attention_layernorm.weight"]
        dx = add_norm_backward((kept.middle, kept.rstd2, norm), d_normed, dx, micro.partials[2 * i + 1])

        self.weight_grad(attn + "o_proj.weight", dx, kept.context, rank=0, alpha=RESIDUAL_SCALE)
        d_context = linear_input_grad(dx, w[attn + "o_proj.weight"], rank=3, alpha=RESIDUAL_SCALE)
        d_out = d_context.view(rows, -1, HEADS, HEAD_DIM).transpose(1, 2)
        d_qkv = self.attention_backward(kept.attention, d_out, micro)
        self.weight_grad(attn + "qkv_proj.weight", d_qkv, kept.normed1, rank=0)
        d_normed = linear_input_grad(d_qkv, w[attn + "qkv_proj.weight"], rank=5)
        norm = w[f"model.layers.{i}.input_layernorm.weight"]
        return add_norm_backward((kept.x, kept.rstd1, norm), d_normed, dx, micro.partials[2 * i])

    def attention_backward(self, saved: tuple, d_out: Tensor, micro: MicroBatch) -> Tensor:
        """The gradient of the packed product, [T, Q_WIDTH + 2 * KV_WIDTH], from that of the context [N, H, S, K]."""
        if not self.plain:
            d_qkv = flash_attention_backward(saved, d_out)
            return rope_backward_(d_qkv, micro.cos, micro.sin, HEADS, GROUPS, HEAD_DIM)
        backward = exact_attention_backward
        d_q, d_k, d_v = (d.transpose(1, 2).flatten(2).flatten(0, 1) for d in backward(saved, d_out))
        return rope_backward(d_q, d_k, d_v, micro.cos, micro.sin, GROUPS, HEAD_DIM)

    def weight_grad(self, name: str, d_y: Tensor, x: Tensor, rank: int, alpha: float = 1.0) -> None:
        linear_weight_grad_(self.grad[name], d_y, x, rank, alpha)

    # One step: micro-batches, reduction, clipping, update. Nothing here waits for the device.

    @torch.no_grad()
    def step(self, batch: Any, lr: float) -> StepResult:
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
        if self.group is not None:
            dist.all_reduce(self.grad.flat, group=self.group)
            dist.all_reduce(loss, group=self.group)
        norm = grad_norm(self.grad.flat)
        r = self.recipe
        buffers = (self.grad.flat, self.master.flat, self.exp_avg.flat, self.exp_avg_sq.flat, self.weight.flat)
        rate = torch.full((), lr, dtype=torch.float64, device=self.device)
        betas = (r["beta1"], r["beta2"])
        applied = adamw_(
            buffers, self.master.decayed, self.updates, rate, norm, r["clip"], betas, r["eps"], r["weight_decay"]
        )
        return StepResult(loss, norm, applied)

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
        if key in self.graphs or not self.master.flat.is_cuda:
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
        shares = []
        for part, key in self.micro_batches(batch):
            micro = self.fill(batch, part, key)
            shares.append(self.head(self.trunk(micro, None)[1], micro, gradient=False)[0])
        return torch.stack(shares).sum()

    # Weights and state.

    def load(self, weights: Mapping[str, Tensor]) -> None:
        views = canonical_views(self.master.stored)
        if set(weights) != set(views):
            raise ValueError(f"weights do not fit this engine: {sorted(set(weights) ^ set(views))[:3]}")
        for name, view in views.items():
            view.copy_(weights[name].to(self.dtype))
        self.exp_avg.flat.zero_()
        self.exp_avg_sq.flat.zero_()
        self.updates.zero_()
        self.round_weights()

    def round_weights(self) -> None:
        if self.weight is not self.master:
            self.weight.flat.copy_(self.master.flat)

    def state(self) -> dict[str, Shard]:
        kinds = {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        shards = {}
        for kind, flat in kinds.items():
            for name, tensor in canonical_views(flat.stored).items():
                shards[f"{kind}/{name}"] = Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim())
        return {**shards, "step": Shard(self.updates, (), ())}

    def restore(self, state: Mapping[str, Any]) -> None:
        kinds = {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        for kind, flat in kinds.items():
            for name, view in canonical_views(flat.stored).items():
                view.copy_(state[f"{kind}/{name}"].tensor)
        self.updates.copy_(state["step"].tensor)
        self.round_weights()


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
        for library in (
            flash_kernels,
            gated_kernel,
        ):
            try:
                library()
            except ImportError as error:
                raise ValueError(f"this engine needs more than torch: {error}") from error
