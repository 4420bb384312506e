"""Products by cuBLASLt, which lets us name the algorithm.

    forward    y [T, O] = x [T, I] · weightᵀ
    backward   d_x = alpha * d_y · weight            grad [O, I] (fp32) += alpha * d_yᵀ · x

A weight is [O, I], as Hugging Face stores it; accumulation is fp32, and rounds once. The weight's gradient is
accumulated inside the product, which reads and writes the fp32 buffer itself. alpha carries a constant that scales
the branch (muP), which so costs nothing.

``rank`` says which algorithm of those that cuBLASLt proposes for the shape, best guess first, is taken: its guess is
often not the fastest. A number written down, and not a race at start-up, so that a run can be repeated bit for bit on
the same GPU and version of cuBLAS. In fp32, and on a CPU, torch's own product is taken, and rank means nothing.

Operands are bf16; or fp8, each with units on the device that its numbers are multiplied by.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

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
