"""The production schedule's C++ kernels, ``ops/cpu/*.cpp``, which stand in the engine's file.

torch's own compiler of regions builds and loads them, with its flags and its cache, so they need nothing that regions
do not need. Shapes as in ``forgetrain.ops.regions``; T is N · S.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from forgetrain.ops.products import product_torch, weight_gradient_torch


def kernel_source(name: str) -> str:
    """``ops/cpu/<name>.cpp`` with what it includes of that folder, for it stands alone in the engine's file."""
    folder = importlib.resources.files("forgetrain.ops.cpu")
    vectors = folder.joinpath("vectors.h").read_text("utf-8")
    return folder.joinpath(f"{name}.cpp").read_text("utf-8").replace('#include "vectors.h"\n', vectors)


def compiled_kernel(source: str, dtype: torch.dtype, arguments: Iterable[str], definitions: str = "") -> Callable:
    """The function ``kernel`` of a C++ text in which Number is this dtype; ``arguments``: their types."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache  # takes a second, so not before it is needed

    number = {torch.float32: "float", torch.bfloat16: "uint16_t"}[dtype]
    head = f"#include <cstdint>\ntypedef {number} Number;\n{definitions}"
    types = [argument.replace("Number", number) for argument in arguments]
    return CppPythonBindingsCodeCache.load_pybinding(types, head + source)


def compiled_attention(
    source: str, groups: int, heads_per_group: int, head_dim: int, scale: float, dtype: torch.dtype
) -> Callable:
    """The kernel for these sizes, built on the first call in an environment: two seconds."""
    pairs = int(dtype == torch.bfloat16 and head_dim % 16 == 0 and heads_per_group % 2 == 0)
    sizes = f"constexpr int G = {groups}, R = {heads_per_group}, K = {head_dim};\nconstexpr float SCALE = {scale!r};"
    given = ["const Number*", "const float*", "const float*", "const int64_t*"]
    forward, backward = ["Number*", "float*"], ["const Number*", "Number*"]
    arguments = [*given, *forward, *backward, "int64_t", "int64_t", "int64_t"]
    return compiled_kernel(source, dtype, arguments, f"#define PAIRS {pairs}\n{sizes}\n")


def attention_native_forward(
    kernel: Callable, qkv: Tensor, cos: Tensor, sin: Tensor, first: Tensor, s: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of qkv, [T, columns of Q, K and V], in rows of ``s`` positions, Q and K turned on the way.
    cos and sin: fp32 [T, K], contiguous; first: int64 [T], the first key of its row that each position sees.
    -> (context [T, heads · K], the logarithms of the sums of exponentials, fp32 [T, heads])."""
    context, log_sum = qkv.new_empty(qkv.shape[0], heads * cos.shape[-1]), cos.new_empty(qkv.shape[0], heads)
    kernel(qkv, cos, sin, first, context, log_sum, context, context, qkv.shape[0] // s, s, 0)
    return context, log_sum


def attention_native_backward(
    kernel: Callable, qkv: Tensor, cos: Tensor, sin: Tensor, first: Tensor, context: Tensor, log_sum: Tensor,
    d_context: Tensor, s: int,
) -> Tensor:  # fmt: skip
    """-> the gradient of qkv."""
    d_qkv = torch.empty_like(qkv)
    kernel(qkv, cos, sin, first, context, log_sum, d_context, d_qkv, qkv.shape[0] // s, s, 1)
    return d_qkv


def compiled_products(source: str, dtype: torch.dtype) -> Callable | None:
    """The kernel of products, built on the first call in an environment. None for bf16 where the processor multiplies
    it, which oneDNN makes use of, in torch.mm."""
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return None
    return compiled_kernel(source, dtype, ["const Number*", "const Number*", "Number*", "float*", *["int64_t"] * 9])


def product_native(kernel: Callable | None, a: Tensor, b: Tensor) -> Tensor:
    """a_MK · b_NKᵀ -> [M, N] in their dtype; both may be transposed views or parts of a matrix."""
    if kernel is None:
        return product_torch(a, b)
    if a.dtype != b.dtype or a.shape[1] != b.shape[1]:
        raise ValueError(f"no product of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty(m, n)
    sums = out if out.dtype == torch.float32 else out.new_empty(m, n, dtype=torch.float32)
    kernel(a, b, out, sums, m, n, k, *a.stride(), *b.stride()[::-1], 0, 0)
    return out


def weight_gradient_native(kernel: Callable | None, grad: Tensor, d_out: Tensor, x: Tensor, replace: bool) -> None:
    """d_out_TOᵀ · x_TI into grad_OI, fp32 and contiguous: in place of what is there, or added to it."""
    if kernel is None:
        return weight_gradient_torch(grad, d_out, x, replace)
    alike = (d_out.dtype, d_out.shape[0]) == (x.dtype, x.shape[0])
    if not alike or grad.dtype != torch.float32 or not grad.is_contiguous():
        raise ValueError(f"no gradient of {d_out.dtype} {tuple(d_out.shape)} and {x.dtype} {tuple(x.shape)}")
    (k, m), n = d_out.shape, x.shape[1]
    kernel(d_out, x, d_out, grad, m, n, k, *d_out.stride()[::-1], *x.stride(), 1, int(replace))
    return None
