"""Attention of the production schedule as one C++ kernel, ``ops/cpu/attention.cpp``, which stands in the engine's file.

torch's own compiler of regions builds and loads it, with its flags and its cache, so it needs nothing that regions do
not need. Shapes as in ``forgetrain.ops.regions``; T is N · S.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor.codecache import CppPythonBindingsCodeCache


def compiled_attention(source: str, groups: int, heads_per_group: int, head_dim: int, dtype: torch.dtype) -> Callable:
    """The kernel for these sizes, built on the first call in an environment: two seconds."""
    number = {torch.float32: "float", torch.bfloat16: "uint16_t"}[dtype]
    sizes = f"constexpr int G = {groups}, R = {heads_per_group}, K = {head_dim};"
    pairs = int(dtype == torch.bfloat16 and head_dim % 16 == 0 and heads_per_group % 2 == 0)
    head = f"#include <cstdint>\n#define PAIRS {pairs}\n{sizes}\ntypedef {number} Number;\n"
    arguments = f"const {number}*|const int64_t*|{number}*|float*|const {number}*|float*|int64_t|int64_t|int64_t"
    return CppPythonBindingsCodeCache.load_pybinding(arguments.split("|"), head + source)


def attention_native_forward(
    kernel: Callable, qkv: Tensor, first: Tensor, s: int, heads: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of qkv, [T, columns of Q (turned and scaled), K (turned) and V], in rows of ``s`` positions.
    first: int64 [T], the first key of its row that each position sees. -> (context [T, heads · K], the logarithms of
    the sums of exponentials, fp32 [T, heads])."""
    context = qkv.new_empty(qkv.shape[0], heads * head_dim)
    log_sum = torch.empty(qkv.shape[0], heads)
    kernel(qkv, first, context, log_sum, context, log_sum, qkv.shape[0] // s, s, 0)
    return context, log_sum


def attention_native_backward(
    kernel: Callable, qkv: Tensor, first: Tensor, context: Tensor, log_sum: Tensor, d_context: Tensor, s: int
) -> Tensor:
    """-> the gradient of qkv, fp32 [T, ...]."""
    d_qkv = torch.empty(qkv.shape)
    kernel(qkv, first, context, log_sum, d_context, d_qkv, qkv.shape[0] // s, s, 1)
    return d_qkv
