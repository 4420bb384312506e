"""Targets from Hugging Face configs: each family as transformers builds it, and what is refused, by key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from forgetrain.errors import UserError
from forgetrain.spec.estimate import parameters
from forgetrain.spec.hf import target_from_hf

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 64,
}


def write(folder: Path, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE | config))
    return folder


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_family_as_transformers_saves_it(family, tmp_path):
    config = getattr(transformers, f"{family}Config")(**SHAPE, head_dim=16, rope_theta=12345.0, rms_norm_eps=1e-5)
    with torch.device("meta"):
        module = getattr(transformers, f"{family}ForCausalLM")(config)
    module.config.architectures = [f"{family}ForCausalLM"]
    module.config.save_pretrained(tmp_path / "Some Model")
    drawn = target_from_hf(tmp_path / "Some Model")
    model = drawn.target.model
    assert drawn.target.name == "some-model"
    assert drawn.unread == ()
    assert model.architecture == family.lower()
    assert (model.rope_theta, model.rms_norm_eps) == (12345.0, 1e-5)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == model.parameter_shapes()
    assert parameters(model).total == sum(p.numel() for p in module.parameters())


def test_older_config_with_its_keys_left_out(tmp_path):
    folder = write(tmp_path / "m", architectures=["LlamaForCausalLM"], torch_dtype="bfloat16", some_new_key=1)
    drawn = target_from_hf(folder, name="mine", hardware="h100")
    target = drawn.target
    assert (target.name, target.precision.dtype, target.hardware.name) == ("mine", "bf16", "h100")
    assert (target.model.head_dim, target.model.rope_theta) == (12, 10000.0)
    assert target.recipe.sequence_length == 64
    assert drawn.unread == ("some_new_key",)


def test_minicpm_with_its_scales_and_tokenizer(tmp_path):
    scales = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 24, "tie_word_embeddings": False}
    folder = write(tmp_path / "m", architectures=["MiniCPMForCausalLM"], **scales, eos_token_id=[2, 5])
    (folder / "tokenizer.json").write_text("{}")
    target = target_from_hf(folder).target
    assert target.model.architecture == "minicpm"
    assert target.model.logit_divisor == 2.0
    assert target.model.eos_token_id == [2, 5]
    assert target.reference.name == "transformers"
    assert target.data.tokenizer == str(folder.resolve())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("partial_rotary_factor", 0.5),
        ("attention_dropout", 0.1),
        ("num_experts", 8),
        ("quantization_config", {"bits": 4}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_parameters.rope_type", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}),
        ("rope_parameters.type", {"rope_parameters": {"type": "yarn", "factor": 4.0, "rope_theta": 1e6}}),
        ("rope_parameters.full_attention", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
        ("rope_parameters.partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("model.rope_theta", {"rope_parameters": {"rope_theta": None}}),
        ("model.rope_theta", {"rope_parameters": {"rope_theta": "abc"}}),
        ("rope_parameters", [1]),
        ("rope_theta", "abc"),
        ("tie_word_embeddings", "false"),
        ("num_attention_heads", 0),
        ("head_dim", 0),
        ("layer_types", 5),
        ("max_position_embeddings", "64"),
        ("hidden_size", True),
        ("architectures", ["GPT2LMHeadModel"]),
        ("architectures", [["x"]]),
        ("model_type", {"architectures": None, "model_type": ["llama"]}),
        ("hidden_size", None),
        ("vocab_size", "many"),
        ("hidden_size", 50),
        ("model.num_attention_heads", {"num_key_value_heads": 3}),
    ],
)
def test_refused_by_key(key, value, tmp_path):
    changes = value if "." in key or key == "model_type" else {key: value}
    folder = write(tmp_path / "m", **({"architectures": ["LlamaForCausalLM"]} | changes))
    with pytest.raises(UserError) as caught:
        target_from_hf(folder)
    assert str(folder) in str(caught.value)
    assert key.removeprefix("model.") in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("given", [{}, {"num_key_value_heads": None}], ids=["left out", "null"])
def test_key_value_heads_that_are_not_given_are_those_of_transformers(model_type, given, tmp_path):
    config = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    config |= {"hidden_size": 1024, "num_attention_heads": 64, "model_type": model_type, **given}
    (tmp_path / "config.json").write_text(json.dumps(config))
    due = transformers.AutoConfig.from_pretrained(tmp_path).num_key_value_heads
    assert target_from_hf(tmp_path).target.model.num_key_value_heads == due


def test_plain_rope_under_its_older_names(tmp_path):
    parameters = {"type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}
    folder = write(tmp_path / "m", architectures=["LlamaForCausalLM"], rope_parameters=parameters)
    assert target_from_hf(folder).target.model.rope_theta == 1e6


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        target_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        target_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        target_from_hf(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="model_type: unknown architecture"):
        target_from_hf(tmp_path)
