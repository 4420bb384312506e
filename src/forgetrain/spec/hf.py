"""A target from a Hugging Face model's ``config.json``; what this package does not compute is refused, by key.

    drawn = target_from_hf(Path("Qwen3-0.6B"))
    drawn.target.model.qk_norm, drawn.unread      # True, ("torch_dtype_of_the_future",)

The families are Llama, Qwen2, Qwen3 and MiniCPM, with the defaults of their transformers classes for keys that a
config leaves out. Only the architecture comes from there: the recipe, which no config holds, gets usual values.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from forgetrain.errors import UserError
from forgetrain.spec.section import Positive, PositiveFloat, Section, refusal
from forgetrain.spec.target import Target, parse_target

#: model_type → values that its transformers class takes for keys that a config leaves out.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "qwen2": {
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    "minicpm": {
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "scale_emb": 1,
        "scale_depth": 1,
        "dim_model_base": 1,
    },
}

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MiniCPMForCausalLM": "minicpm",
}

#: Keys that say nothing about the computation in training, or that are looked at below.
HARMLESS = {
    *("architectures", "auto_map", "dtype", "initializer_range", "max_window_layers", "model_type", "name_or_path"),
    *("rope_parameters", "torch_dtype", "transformers_version", "use_cache", "_name_or_path", "_attn_implementation"),
    *("num_key_value_heads", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim"),
    *(
        "scale_emb",
        "scale_depth",
        "dim_model_base",
        "sliding_window",
        "return_dict",
        "output_attentions",
        "mup_denominator",
    ),
    *("output_hidden_states", "unk_token_id", "is_encoder_decoder", "chunk_size_feed_forward", "problem_type"),
    *("id2label", "label2id", "rope_theta", "max_position_embeddings", "rms_norm_eps", "layer_types", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
}

#: Key → the only values this package computes; anything else would change the computation.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "partial_rotary_factor": (None, 1.0),
    "attention_bias": (None, False),  # in these families it would put a bias on o_proj as well
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0.0),
    "use_sliding_window": (None, False),
    "pretraining_tp": (None, 1),
    "quantization_config": (None,),
    "sparse_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}

#: The same of ``rope_parameters``, where any other key but ``rope_theta`` is of another kind of RoPE, or is a layer
#: type with its own. transformers reads ``type`` where there is no ``rope_type``.
ONLY_ROPE: dict[str, tuple[Any, ...]] = {
    "rope_type": ("default",),
    "type": ("default",),
    "partial_rotary_factor": (None, 1.0),
}

_PLAIN_ROPE = 'set rope_type to "default" in a copy of config.json, and leave out all but rope_theta, for plain RoPE'
REMEDIES = {
    "rope_scaling": "set it to null in a copy of config.json to train with plain RoPE",
    "attention_bias": "it would add a bias to o_proj, which no variant has; choose a model without it",
    "quantization_config": "take the model's unquantised folder",
    "attention_dropout": "set it to 0.0 in a copy of config.json; pre-training uses none",
}


class _Config(Section):
    """What is computed with here, typed before it is; the other keys go to the target, which checks them."""

    model_config = ConfigDict(extra="ignore")

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive | None = None
    head_dim: Positive | None = None
    vocab_size: Positive
    max_position_embeddings: Positive
    rope_theta: PositiveFloat
    rope_parameters: dict[str, Any] = Field(default_factory=dict)
    layer_types: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Drawn:
    target: Target
    unread: tuple[str, ...]  # keys that this package does not know, for the user to judge


def target_from_hf(folder: Path, *, name: str | None = None, hardware: str = "cpu") -> Drawn:
    """Draws a target from ``folder/config.json`` (or from that file itself).

    Raises:
        UserError: no such file, not JSON, another architecture, or a key whose value is not supported.
    """
    file = folder if folder.is_file() else folder / "config.json"
    config = _read(file)
    family = _family(config, file)
    _require_supported(config, file)
    # null is a missing key, but for this one, where it is as many heads as there are query heads
    given = {key: value for key, value in config.items() if value is not None or key == "num_key_value_heads"}
    given = FAMILIES[family] | given
    try:
        typed = _Config.model_validate(given)
    except ValidationError as error:
        wrong = "correct it in a copy of config.json"
        raise refusal(error, file=file, missing="add it to config.json", wrong=wrong) from None
    _require_plain(typed, file)
    values = _model(given, typed, family, file)
    default = re.sub(r"[^a-z0-9._-]+", "-", file.resolve().parent.name.lower()).strip("-._") or "model"
    rest = _rest(config, family, typed.max_position_embeddings, hardware, file)
    tree = {"name": name or default, "model": values} | rest
    unread = tuple(sorted(config.keys() - HARMLESS - ONLY.keys()))
    return Drawn(parse_target(tree, file=file), unread)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError("no such file", file=file, remedy="name a folder that holds a model's config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON: {error}", file=file, remedy="download it again") from None
    if not isinstance(config, dict):
        raise UserError("is not a JSON object", file=file, remedy="download it again")
    return config


def _family(config: dict[str, Any], file: Path) -> str:
    architectures = config.get("architectures")
    key, found = "architectures", architectures[0] if isinstance(architectures, list) and architectures else None
    if found is not None:
        family = ARCHITECTURES.get(str(found))
    else:
        key, found = "model_type", config.get("model_type")
        family = found if str(found) in FAMILIES else None
    if family is None:
        raise UserError(
            "unknown architecture", file=file, key=key, value=found, remedy=f"supported are {', '.join(ARCHITECTURES)}"
        )
    return family


def _require_supported(config: dict[str, Any], file: Path) -> None:
    for key, allowed in ONLY.items():
        if config.get(key, allowed[0]) not in allowed:
            remedy = REMEDIES.get(key, f"the only value supported is {json.dumps(allowed[-1])}")
            raise UserError("is not supported", file=file, key=key, value=config[key], remedy=remedy)


def _require_plain(config: _Config, file: Path) -> None:
    """Full attention in every layer, and one plain RoPE for all of them."""
    for kind in config.layer_types:
        if kind != "full_attention":
            remedy = "choose a model whose layers all have full attention"
            raise UserError("is not supported", file=file, key="layer_types", value=kind, remedy=remedy)
    for key, value in config.rope_parameters.items():
        if key != "rope_theta" and value not in ONLY_ROPE.get(key, ()):
            key = f"rope_parameters.{key}"
            raise UserError("is not supported", file=file, key=key, value=value, remedy=_PLAIN_ROPE)


def _model(given: dict[str, Any], config: _Config, family: str, file: Path) -> dict[str, Any]:
    heads = config.num_attention_heads
    if config.head_dim is None and config.hidden_size % heads:
        raise UserError(
            f"is not divisible by num_attention_heads = {heads}, and head_dim is not given",
            file=file,
            key="hidden_size",
            value=config.hidden_size,
            remedy="add head_dim",
        )
    values = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads or heads,
        "head_dim": config.head_dim or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
        # transformers 5 keeps it in rope_parameters, older ones beside the other keys
        "rope_theta": config.rope_parameters.get("rope_theta", config.rope_theta),
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
    }
    taken = ["rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"]
    if family == "minicpm":
        taken += ["scale_emb", "scale_depth", "dim_model_base"]
    return values | {key: given[key] for key in taken if key in given}


def _rest(config: dict[str, Any], family: str, positions: int, hardware: str, file: Path) -> dict[str, dict[str, Any]]:
    """Everything but the model: what a config does not say, at usual values for the user to change."""
    dtype = "bf16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "fp32"
    rest: dict[str, dict[str, Any]] = {
        "recipe": {
            "lr": 3e-4,
            "min_lr": 3e-5,
            "warmup_steps": 500,
            "decay_steps": 1000,
            "batch_size": 128,
            "micro_batch_size": 1,
            "sequence_length": min(4096, positions),
            "steps": 10000,
        },
        "precision": {"dtype": dtype},
        "hardware": {"name": hardware},
        # megatron-core has MiniCPM's scales only in part, so transformers is the reference there.
        "reference": {"name": "transformers" if family == "minicpm" else "megatron"},
        "gates": {"sequence_length": min(128, positions)},
    }
    if (file.resolve().parent / "tokenizer.json").is_file():
        rest["data"] = {"tokenizer": str(file.resolve().parent)}
    return rest
