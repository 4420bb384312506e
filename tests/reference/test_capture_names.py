"""From the modules of anybody's model to canonical names and layouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from forgetrain.errors import UserError
from forgetrain.reference.capture_names import in_layout, resolve, split_rows
from tests.tiny import tiny_target

LAYER = r"model.layers.\1."
#: A model with fused projections, as GPT-like code has it.
NAMES = {
    "wte": "model.embed_tokens",
    r"h\.(\d+)\.ln1": LAYER + "input_layernorm",
    r"h\.(\d+)\.qkv": tuple(f"{LAYER}self_attn.{part}_proj" for part in "qkv"),
    r"h\.(\d+)\.proj": LAYER + "self_attn.o_proj",
    r"h\.(\d+)\.ln2": LAYER + "post_attention_layernorm",
    r"h\.(\d+)\.w13": (LAYER + "mlp.gate_proj", LAYER + "mlp.up_proj"),
    r"h\.(\d+)\.w2": LAYER + "mlp.down_proj",
    "ln": "model.norm",
    "head": "lm_head",
}


class Fused(nn.Module):
    def __init__(self, model, bias=False):
        super().__init__()
        d, q = model.hidden_size, model.num_attention_heads * model.head_dim
        kv = model.num_key_value_heads * model.head_dim
        self.wte = nn.Embedding(model.vocab_size, d)
        self.h = nn.ModuleList()
        for _ in range(model.num_hidden_layers):
            layer = nn.Module()
            layer.ln1, layer.ln2 = nn.RMSNorm(d), nn.RMSNorm(d)
            layer.qkv, layer.proj = nn.Linear(d, q + 2 * kv, bias=bias), nn.Linear(q, d, bias=False)
            layer.w13 = nn.Linear(d, 2 * model.intermediate_size, bias=False)
            layer.w2 = nn.Linear(model.intermediate_size, d, bias=False)
            self.h.append(layer)
        self.ln = nn.RMSNorm(d)
        self.head = nn.Linear(d, model.vocab_size, bias=False)
        if model.tie_word_embeddings:
            self.head.weight = self.wte.weight


@pytest.mark.parametrize("architecture", ["minicpm5", "tied", "qwen2"])
def test_fused_parameters_hold_several_canonical_ones(architecture):
    model = tiny_target(architecture).model
    network = Fused(model, bias=model.attention_bias)
    found = {}
    for parameter, names in resolve(network, model, NAMES).parameters:
        found |= split_rows(parameter, names, model)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == model.parameter_shapes()
    assert torch.equal(found["model.layers.1.self_attn.k_proj.weight"], network.h[1].qkv.weight[64:96])


def test_places_between_modules_are_the_inputs_of_the_next():
    network = Fused(tiny_target().model)
    resolved = resolve(network, tiny_target().model, NAMES)
    assert resolved.inputs[network.h[0].proj] == "model.layers.0.self_attn.attention"
    assert resolved.inputs[network.h[0].ln2] == "model.layers.0.attention_residual"
    assert resolved.inputs[network.h[1].ln1] == "model.layers.0.mlp_residual"
    assert resolved.inputs[network.ln] == "model.layers.1.mlp_residual"
    assert resolved.missing == [f"model.layers.{i}.self_attn.{part}_rope" for i in (0, 1) for part in "qk"]
    named = resolve(network, tiny_target().model, {r"h\.(\d+)": LAYER + "mlp_residual", **NAMES})
    assert network.ln not in named.inputs
    assert named.outputs[network.h[1]] == ("model.layers.1.mlp_residual",)


def test_embeddings_tied_or_not_must_be_the_targets():
    tied, untied = tiny_target("tied").model, tiny_target().model
    with pytest.raises(UserError, match=r"head\.weight: is the embedding again"):
        resolve(Fused(tied), untied, NAMES)
    with pytest.raises(UserError, match=r"head\.weight: is not the embedding"):
        resolve(Fused(untied), tied, NAMES)


def test_layouts_are_turned_into_the_canonical_one():
    x = torch.arange(2.0 * 5 * 12).view(2, 5, 12)  # N, S, width
    heads = x.view(2, 5, 3, 4)
    for theirs in (x, heads, heads.transpose(1, 2), x.transpose(0, 1), x.view(10, 12)):
        found = in_layout(theirs, "place", 2, 5, 12)
        assert torch.equal(found, x)
        assert found.is_contiguous()
    assert torch.equal(in_layout(torch.arange(10.0), "nll", 2, 5, None), torch.arange(10.0).view(2, 5))
    assert in_layout(torch.ones(1), "loss", 2, 5, None).shape == ()


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 5, 11), "is no layout of [2, 5, 12]"),
        ((2, 12), "is no layout"),
        ((2, 5, 5, 4), "could be read in two ways"),
    ],
)
def test_shapes_that_say_too_little_are_refused(shape, words):
    width = 20 if len(shape) == 4 else 12
    with pytest.raises(UserError) as refused:
        in_layout(torch.zeros(shape), "place", 2, 5, width)
    assert words in str(refused.value)
