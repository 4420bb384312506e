"""Which choices of a plan can be to blame when a tap is the first that differs.

Everything before the tap is equal, so a forward tap blames the op that made it, and a gradient tap ``X#grad`` the
backward of the ops that read X. Equal values can still lie in memory in another layout, whose sums then run in another
order: that is why ops further up are on some lists.
"""

from __future__ import annotations

from forgetrain.engine.plan import choices
from forgetrain.ops.table import OPS
from forgetrain.spec.target import Target

#: Last part of a tap's place → plan keys, the likeliest first.
_FORWARD: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("embedding",),
    "input_layernorm": ("rmsnorm",),
    "post_attention_layernorm": ("rmsnorm",),
    "norm": ("rmsnorm",),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("linear", "qkv", "token_order")),
    **dict.fromkeys(("q_norm", "k_norm"), ("qk_norm",)),
    **dict.fromkeys(("q_rope", "k_rope"), ("rope", "rope_tables")),
    "attention": ("attention", "rope", "token_order"),
    **dict.fromkeys(("o_proj", "down_proj"), ("linear", "token_order")),
    **dict.fromkeys(("attention_residual", "mlp_residual"), ("residual",)),
    **dict.fromkeys(("gate_proj", "up_proj"), ("linear", "gate_up", "token_order")),
    "swiglu": ("swiglu", "gate_up"),
    "lm_head": ("mup", "linear", "token_order"),
    "nll": ("cross_entropy",),
    "loss": ("cross_entropy", "token_order"),
}
_GRADIENT: dict[str, tuple[str, ...]] = {
    "lm_head": ("cross_entropy",),
    "norm": ("linear", "mup", "cross_entropy"),
    **dict.fromkeys(("embed_tokens", "mlp_residual", "attention_residual"), ("rmsnorm", "residual")),
    **dict.fromkeys(("down_proj", "o_proj"), ("residual",)),
    **dict.fromkeys(("swiglu", "attention"), ("linear", "token_order")),
    **dict.fromkeys(("gate_proj", "up_proj"), ("swiglu",)),
    "post_attention_layernorm": ("gate_up", "linear", "swiglu", "token_order"),
    **dict.fromkeys(("q_rope", "k_rope", "v_proj"), ("attention", "rope")),
    **dict.fromkeys(("q_norm", "k_norm"), ("rope", "attention")),
    **dict.fromkeys(("q_proj", "k_proj"), ("qk_norm", "rope", "attention")),
    "input_layernorm": ("qkv", "qkv_sum", "linear", "rope", "attention", "qk_norm", "token_order"),
}
#: Gradients of parameters, by the module that owns them.
_PARAMETER: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("embedding", "token_order", "accumulate"),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), ("rmsnorm", "token_order", "accumulate")),
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj"),
        ("linear", "qkv", "rope", "attention", "qk_norm", "token_order", "accumulate"),
    ),
    **dict.fromkeys(("q_norm", "k_norm"), ("qk_norm", "rope", "token_order", "accumulate")),
    **dict.fromkeys(("gate_proj", "up_proj"), ("linear", "gate_up", "swiglu", "token_order", "accumulate")),
    **dict.fromkeys(("o_proj", "down_proj"), ("linear", "token_order", "accumulate")),
    "lm_head": ("linear", "cross_entropy", "token_order", "accumulate"),
}
#: How the references store and order their tensors, where the names of the options do not say it.
_STRUCTURE = {
    "megatron": {"token_order": "sequence", "qkv": "grouped", "gate_up": "fused", "norm_order": "megatron"},
    "transformers": {"qkv": "split", "gate_up": "split", "qkv_sum": "v+k+q", "norm_order": "huggingface"},
}
_UPDATE = ("adamw", "muon", "clip", "norm_order", "accumulate")


def suspects(tap: str, target: Target) -> list[str]:
    """Plan keys that can explain a difference at this name of the evidence, the likeliest first."""
    usable = choices(target)
    place, _, kind = tap.partition("#")
    kind = kind.partition("@")[0]
    parts = place.split(".")
    if kind == "fwd":
        keys = _FORWARD.get(parts[-1], ())
    elif kind == "grad" and parts[-1] in ("weight", "bias"):
        keys = _PARAMETER.get(parts[-2], ())
    elif kind == "grad":
        keys = _GRADIENT.get(parts[-1], ())
    elif kind == "clipped" or tap == "step.grad_norm":
        keys = ("clip", "norm_order", "qkv", "gate_up", "token_order", "accumulate")
    elif tap == "step.loss":
        keys = ("cross_entropy", "accumulate", "token_order")
    else:
        keys = _UPDATE
    return [key for key in keys if key in usable]


def familiar(key: str, name: str, reference: str) -> bool:
    """Whether this choice was written after the reference. It decides between choices that reach equally far, no more:
    two variants may agree on one step's numbers and differ on the next."""
    if key in OPS:
        return reference in OPS[key][name].note.lower()
    return _STRUCTURE.get(reference, {}).get(key) == name
