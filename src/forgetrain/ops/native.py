"""Attention of the production schedule as one C++ kernel, ``ops/cpu/attention.cpp``, which stands in the engine's file.

torch's own compiler of regions builds and loads it, with its flags and its cache, so it needs nothing that regions do
not need. Shapes as in ``forgetrain.ops.regions``; T is N · S.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def compiled_attention(
    source: str, groups: int, heads_per_group: int, head_dim: int, scale: float, dtype: torch.dtype
) -> Callable:
    """The kernel for these sizes, built on the first call in an environment: two seconds."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache  # takes a second, so not before it is needed

    number = {torch.float32: "float", torch.bfloat16: "uint16_t"}[dtype]
    pairs = int(dtype == torch.bfloat16 and head_dim % 16 == 0 and heads_per_group % 2 == 0)
    sizes = f"constexpr int G = {groups}, R = {heads_per_group}, K = {head_dim};\nconstexpr float SCALE = {scale!r};"
    head = f"#include <cstdint>\n#define PAIRS {pairs}\n{sizes}\ntypedef {number} Number;\n"
    given = [f"const {number}*", "const float*", "const float*", "const int64_t*"]
    forward, backward = [f"{number}*", "float*"], [f"const {number}*", f"{number}*"]
    arguments = [*given, *forward, *backward, "int64_t", "int64_t", "int64_t"]
    return CppPythonBindingsCodeCache.load_pybinding(arguments, head + source)


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
