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

from forgetrain.errors import UserError
from forgetrain.spec.target import Target, parse_target

#: model_type → values that its transformers class takes for keys that a config leaves out.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "qwen2": {"max_position_embeddings": 32768, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "qwen3": {"max_position_embeddings": 32768, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "head_dim": 128},
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

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

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
    *("id2label", "label2id", "rope_theta", "max_position_embeddings", "rms_norm_eps", *REQUIRED),
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

REMEDIES = {
    "rope_scaling": "set it to null in a copy of config.json to train with plain RoPE",
    "attention_bias": "it would add a bias to o_proj, which no variant has; choose a model without it",
    "quantization_config": "take the model's unquantised folder",
    "attention_dropout": "set it to 0.0 in a copy of config.json; pre-training uses none",
}


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
    for key, allowed in ONLY.items():
        if config.get(key, allowed[0]) not in allowed:
            remedy = REMEDIES.get(key, f"the only value supported is {json.dumps(allowed[-1])}")
            raise UserError("is not supported", file=file, key=key, value=config[key], remedy=remedy)
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise UserError(
            "is not supported",
            file=file,
            key="layer_types",
            value=next(kind for kind in config["layer_types"] if kind != "full_attention"),
            remedy="choose a model whose layers all have full attention",
        )
    values = _model(config, family, file)
    default = re.sub(r"[^a-z0-9._-]+", "-", file.resolve().parent.name.lower()).strip("-._") or "model"
    tree = {"name": name or default, "model": values} | _rest(config, family, values, hardware, file)
    unread = tuple(sorted(config.keys() - HARMLESS - ONLY.keys() - {"layer_types"}))
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
        family = ARCHITECTURES.get(found)
    else:
        key, found = "model_type", config.get("model_type")
        family = found if found in FAMILIES else None
    if family is None:
        raise UserError(
            "unknown architecture", file=file, key=key, value=found, remedy=f"supported are {', '.join(ARCHITECTURES)}"
        )
    return family


def _model(config: dict[str, Any], family: str, file: Path) -> dict[str, Any]:
    for key in REQUIRED:
        if not isinstance(config.get(key), int):
            problem = "is missing" if config.get(key) is None else "is not a whole number"
            raise UserError(problem, file=file, key=key, value=config.get(key), remedy="add it to config.json")
    given = FAMILIES[family] | {key: value for key, value in config.items() if value is not None}
    heads = given["num_attention_heads"]
    if "head_dim" not in given and given["hidden_size"] % heads:
        raise UserError(
            f"is not divisible by num_attention_heads = {heads}, and head_dim is not given",
            file=file,
            key="hidden_size",
            value=given["hidden_size"],
            remedy="add head_dim",
        )
    values = {key: given[key] for key in REQUIRED}
    values |= {
        "num_key_value_heads": given.get("num_key_value_heads", heads),
        "head_dim": given.get("head_dim", given["hidden_size"] // heads),
        "rope_theta": _rope_theta(given, file),
        "rms_norm_eps": given["rms_norm_eps"],
        "tie_word_embeddings": bool(given.get("tie_word_embeddings", False)),
        "max_position_embeddings": given["max_position_embeddings"],
        "attention_bias": family == "qwen2",
        "qk_norm": family == "qwen3",
    }
    optional = ["initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"]
    if family == "minicpm":
        optional += ["scale_emb", "scale_depth", "dim_model_base"]
    return values | {key: given[key] for key in optional if key in given}


def _rope_theta(config: dict[str, Any], file: Path) -> float:
    """transformers 5 keeps it in ``rope_parameters``, older ones beside the other keys."""
    parameters = config.get("rope_parameters") or {}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        raise UserError(
            "is not supported",
            file=file,
            key="rope_parameters.rope_type",
            value=kind,
            remedy='set it to "default" in a copy of config.json to train with plain RoPE',
        )
    return float(parameters.get("rope_theta", config["rope_theta"]))


def _rest(
    config: dict[str, Any], family: str, values: dict[str, Any], hardware: str, file: Path
) -> dict[str, dict[str, Any]]:
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
            "sequence_length": min(4096, values["max_position_embeddings"]),
            "steps": 10000,
        },
        "precision": {"dtype": dtype},
        "hardware": {"name": hardware},
        # megatron-core has MiniCPM's scales only in part, so transformers is the reference there.
        "reference": {"name": "transformers" if family == "minicpm" else "megatron"},
        "gates": {"sequence_length": min(128, values["max_position_embeddings"])},
    }
    if (file.resolve().parent / "tokenizer.json").is_file():
        rest["data"] = {"tokenizer": str(file.resolve().parent)}
    return rest
