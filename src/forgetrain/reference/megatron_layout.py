"""Weights between canonical names and megatron-core's GPTModel: interleaved QKV, fused gate and up.

``to_megatron`` and ``from_megatron`` are inverse to each other bit for bit; they only rename, split and join.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from forgetrain.spec.model import Model

_TOP = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}


def to_megatron(model: Model, canonical: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Canonical tensors under GPTModel's parameter names and in its layout."""
    theirs = {new: canonical[old] for old, new in _TOP.items() if old in canonical}
    for i in range(model.num_hidden_layers):
        old, new = f"model.layers.{i}.", f"decoder.layers.{i}."
        theirs |= {new + b: canonical[old + a] for a, b in _LAYER.items() if old + a in canonical}
        for kind in _qkv_kinds(model):
            parts = [canonical[f"{old}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            theirs[f"{new}self_attention.linear_qkv.{kind}"] = join_qkv(model, parts, dim=0)
        gate_up = [canonical[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up")]
        theirs[f"{new}mlp.linear_fc1.weight"] = torch.cat(gate_up)
    return theirs


def from_megatron(model: Model, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_megatron``, in canonical order."""
    found = {old: theirs[new] for old, new in _TOP.items() if new in theirs}
    for i in range(model.num_hidden_layers):
        old, new = f"model.layers.{i}.", f"decoder.layers.{i}."
        found |= {old + a: theirs[new + b] for a, b in _LAYER.items() if new + b in theirs}
        for kind in _qkv_kinds(model):
            parts = split_qkv(model, theirs[f"{new}self_attention.linear_qkv.{kind}"], dim=0)
            found |= {f"{old}self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
        gate, up = theirs[f"{new}mlp.linear_fc1.weight"].chunk(2)
        found[old + "mlp.gate_proj.weight"], found[old + "mlp.up_proj.weight"] = gate, up
    return {name: found[name].contiguous() for name in model.parameter_shapes()}


def join_qkv(model: Model, parts: list[Tensor], dim: int) -> Tensor:
    """[Q, K, V] along ``dim`` to Megatron's order: for each group its query heads, then its key, then its value."""
    groups = [part.unflatten(dim, (model.num_key_value_heads, -1)) for part in parts]
    return torch.cat(groups, dim=dim + 1 if dim >= 0 else dim).flatten(*_pair(dim))


def split_qkv(model: Model, qkv: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``join_qkv``."""
    d = model.head_dim
    sizes = [model.num_attention_heads // model.num_key_value_heads * d, d, d]
    grouped = qkv.unflatten(dim, (model.num_key_value_heads, -1))
    q, k, v = (part.flatten(*_pair(dim)) for part in grouped.split(sizes, dim=dim + 1 if dim >= 0 else dim))
    return q, k, v


def _pair(dim: int) -> tuple[int, int]:
    """The two dimensions into which ``dim`` was unflattened."""
    return (dim, dim + 1) if dim >= 0 else (dim - 1, dim)


def _qkv_kinds(model: Model) -> tuple[str, ...]:
    return ("weight", "bias") if model.attention_bias else ("weight",)
