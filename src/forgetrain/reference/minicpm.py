"""MiniCPM4 by its published formulas (github.com/OpenBMB/MiniCPM, modeling_minicpm.py), on transformers' Llama modules.

It is Llama with three scales, each a module's hook here:

    embeddings × scale_emb
    residual + branch × (scale_depth / sqrt(layers))            attention's and the MLP's branch alike
    lm_head(hidden / (hidden_size / dim_model_base))

and with queries and keys turned in fp32 and rounded once, where Llama rounds the tables and every product.
transformers is imported at the top: import this module only where it is known to be there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from forgetrain.spec.model import Model


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [N, H, S, K] and k [N, G, S, K] turned by fp32 tables [N, S, K], in fp32, then rounded to their own dtype."""
    cos, sin = cos[:, None], sin[:, None]

    def turn(x: Tensor) -> Tensor:
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    return turn(q), turn(k)


class MiniCPMAttention(modeling_llama.LlamaAttention):
    """Llama's attention around MiniCPM's rotation; without a cache, since it only trains."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(heads).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        name = self.config._attn_implementation
        attend: Any = modeling_llama.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def make_minicpm(network: Any, model: Model) -> None:
    """Turns a LlamaForCausalLM into MiniCPM4; its attention gets new random weights in the default dtype."""
    rotary: Any = network.model.rotary_emb
    rotary.register_forward_pre_hook(lambda _, args: (args[0].float(), *args[1:]))  # its tables come in this dtype
    for i, layer in enumerate(network.model.layers):
        layer.self_attn = MiniCPMAttention(network.config, i)
    if model.scale_emb is not None:
        scale_emb = model.scale_emb
        network.model.embed_tokens.register_forward_hook(lambda _, __, out: out * scale_emb)
    if model.residual_scale is not None:
        scale = model.residual_scale
        for layer in network.model.layers:
            layer.self_attn.register_forward_hook(lambda _, __, out: (out[0] * scale, *out[1:]))
            layer.mlp.register_forward_hook(lambda _, __, out: out * scale)
    if model.logit_divisor is not None:
        divisor = model.logit_divisor
        network.lm_head.register_forward_pre_hook(lambda _, args: (args[0] / divisor, *args[1:]))
