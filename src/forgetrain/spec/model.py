"""Which model a target trains, and the names and shapes of its parameters."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from forgetrain.spec.section import Positive, PositiveFloat, Section


class Model(Section):
    """A dense decoder in Hugging Face Llama terms."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    vocab_size: Positive
    rope_theta: PositiveFloat = 10000.0
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: Positive = 4096
    attention_bias: bool = False  # a bias on q, k and v, none on o, as Qwen2 has it
    qk_norm: bool = False  # RMSNorm over head_dim on q and k before RoPE, as Qwen3 has it
    # MiniCPM's muP scales: embeddings × scale_emb, each residual branch × scale_depth / sqrt(layers),
    # hidden states before the head ÷ (hidden_size / dim_model_base). None leaves the scale out.
    scale_emb: PositiveFloat | None = None
    scale_depth: PositiveFloat | None = None
    dim_model_base: Positive | None = None
    initializer_range: PositiveFloat = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _shapes(self) -> Model:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not divisible by "
                f"num_key_value_heads = {self.num_key_value_heads}; choose a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd, but RoPE rotates pairs; make it even")
        return self

    @property
    def architecture(self) -> Literal["llama", "qwen2", "qwen3", "minicpm"]:
        """The Hugging Face model family whose computation this is."""
        if self.scale_emb is not None or self.scale_depth is not None or self.dim_model_base is not None:
            return "minicpm"
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.attention_bias else "llama"

    @property
    def residual_scale(self) -> float | None:
        """What each residual branch is multiplied by, scale_depth / sqrt(layers); None when there is none."""
        return None if self.scale_depth is None else self.scale_depth / self.num_hidden_layers**0.5

    @property
    def logit_divisor(self) -> float | None:
        """What hidden states are divided by before the head, hidden_size / dim_model_base; None when there is none."""
        return None if self.dim_model_base is None else self.hidden_size / self.dim_model_base

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical (Hugging Face Llama state dict) name → shape, in forward order. A tied head is not listed."""
        h, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for i in range(self.num_hidden_layers):
            p = f"model.layers.{i}."
            shapes[p + "input_layernorm.weight"] = (h,)
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                shapes[p + f"self_attn.{name}_proj.weight"] = (rows, h)
                if self.attention_bias:
                    shapes[p + f"self_attn.{name}_proj.bias"] = (rows,)
            if self.qk_norm:
                shapes[p + "self_attn.q_norm.weight"] = (d,)
                shapes[p + "self_attn.k_norm.weight"] = (d,)
            shapes[p + "self_attn.o_proj.weight"] = (h, q)
            shapes[p + "post_attention_layernorm.weight"] = (h,)
            shapes[p + "mlp.gate_proj.weight"] = (f, h)
            shapes[p + "mlp.up_proj.weight"] = (f, h)
            shapes[p + "mlp.down_proj.weight"] = (h, f)
        shapes["model.norm.weight"] = (h,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes
