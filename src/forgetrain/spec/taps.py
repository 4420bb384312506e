"""The table of taps: every named place in the computation where a reference and an engine are compared.

A tap's full name is ``<place>#fwd@<micro-batch>`` or ``<place>#grad@<micro-batch>``; gradients of parameters, summed
over the step's micro-batches, are ``<parameter>#grad`` (before clipping) and ``<parameter>#clipped``.

    from forgetrain.spec.taps import forward_taps, tap_names
    [tap.name for tap in forward_taps(model)]       # model.embed_tokens, model.layers.0.input_layernorm, ...

Tensors are in canonical layout and the engine's native dtype: activations [N, S, width] with heads flattened into
the width ([N, S, heads * head_dim], head by head), logits [N, S, vocab], nll [N, S] in fp32, loss [].
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from forgetrain.spec.model import Model


@dataclass(frozen=True)
class Tap:
    name: str  # the place, e.g. model.layers.3.self_attn.q_rope
    op: str  # the op whose output it is: the first suspect when this tap diverges
    width: int | None  # last dimension; None for nll and loss


def forward_taps(model: Model) -> list[Tap]:
    """All places in forward order. The gradient taps are the same places, in reverse."""
    h, f = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    taps = [Tap("model.embed_tokens", "embedding", h)]
    for i in range(model.num_hidden_layers):
        p = f"model.layers.{i}."
        taps += [
            Tap(p + "input_layernorm", "rmsnorm", h),
            Tap(p + "self_attn.q_proj", "linear", q),
            Tap(p + "self_attn.k_proj", "linear", kv),
            Tap(p + "self_attn.v_proj", "linear", kv),
        ]
        if model.qk_norm:
            taps += [Tap(p + "self_attn.q_norm", "qk_norm", q), Tap(p + "self_attn.k_norm", "qk_norm", kv)]
        taps += [
            Tap(p + "self_attn.q_rope", "rope", q),
            Tap(p + "self_attn.k_rope", "rope", kv),
            Tap(p + "self_attn.attention", "attention", q),  # the context that enters o_proj
            Tap(p + "self_attn.o_proj", "linear", h),
            Tap(p + "attention_residual", "residual", h),
            Tap(p + "post_attention_layernorm", "rmsnorm", h),
            Tap(p + "mlp.gate_proj", "linear", f),
            Tap(p + "mlp.up_proj", "linear", f),
            Tap(p + "mlp.swiglu", "swiglu", f),  # silu(gate) * up, which enters down_proj
            Tap(p + "mlp.down_proj", "linear", h),
            Tap(p + "mlp_residual", "residual", h),  # the layer's output
        ]
    return [
        *taps,
        Tap("model.norm", "rmsnorm", h),
        Tap("lm_head", "linear", model.vocab_size),
        Tap("nll", "cross_entropy", None),  # negative log-likelihood of each token, unmasked
        Tap("loss", "cross_entropy", None),  # this micro-batch's share of the step's loss
    ]


def tap_names(model: Model, micro_batches: int) -> list[str]:
    """Full names of everything that ``probe`` yields, in topological order.

    For each micro-batch: forward taps, then gradient taps in reverse (``nll`` and ``loss`` have none); after the last:
    parameter gradients in reverse forward order, then the clipped ones.
    """
    places = [tap.name for tap in forward_taps(model)]
    names = []
    for m in range(micro_batches):
        names += [f"{place}#fwd@{m}" for place in places]
        names += [f"{place}#grad@{m}" for place in reversed(places) if place not in ("nll", "loss")]
    parameters = list(reversed(model.parameter_shapes()))
    return names + [f"{p}#grad" for p in parameters] + [f"{p}#clipped" for p in parameters]


def op_of(tap: str, model: Model) -> str:
    """The op to suspect first when the tap with this full name diverges."""
    place, _, kind = tap.partition("#")
    if kind == "clipped":
        return "clip"
    for candidate in forward_taps(model):
        if candidate.name == place or place.startswith(candidate.name + "."):
            return candidate.op
    raise KeyError(tap)


def kind_of(name: str) -> str:
    """The kind of tensor a tap or parameter is, with layers pooled: ``model.layers.*.mlp.swiglu#fwd``."""
    return re.sub(r"@\d+$", "", re.sub(r"\.layers\.\d+\.", ".layers.*.", name))
