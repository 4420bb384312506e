"""Checkpoints as Hugging Face folders, which ``transformers`` loads offline with no custom code.

    exported = export_hf(Path("runs/nano-cpu"), Path("runs/nano-cpu/export/hf"))
    AutoModelForCausalLM.from_pretrained(exported.folder)

The family follows from the target: Llama, Qwen2 (biases on q, k, v) or Qwen3 (QK-norm). Their state dicts are the
canonical names, so weights are written as they are: fp32 masters, or for a bf16 target the bf16 weights that the engine
computed with. MiniCPM's muP scales exist in no Llama; Granite is Llama with exactly these scalars (embedding,
residual and attention multipliers, and a divisor of the logits), lives in transformers, vLLM, SGLang and llama.cpp, and
leaves the weights untouched, where folding the scales into Llama's weights would round each of them once more.

Settings that changed their name between transformers 4 and 5 are written under both.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import forgetrain
from forgetrain.data.tokenizer import CHAT_TEMPLATE, IM_START, TokenizerFolder, open_tokenizer
from forgetrain.durable import new_folder, no_space_named, read_json, sha256_file, write_json
from forgetrain.errors import UserError
from forgetrain.spec.model import Model
from forgetrain.spec.target import Target, parse_target
from forgetrain.train import checkpoint

#: What an export wrote, by name, with hashes: a folder that holds anything else is a user's, and not replaced.
RECORD = "export.json"
#: Weights are split into files of at most this many bytes.
SHARD_BYTES = 4 * 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granite": "GraniteForCausalLM",
}


@dataclass(frozen=True)
class Exported:
    folder: Path
    checkpoint: Path
    step: int
    architecture: str
    parameters: int
    dtype: str


def family(model: Model) -> str:
    """The transformers model type that computes this model. Raises UserError when there is none."""
    if model.architecture == "minicpm":
        if model.qk_norm:
            raise UserError(
                "together with muP scales is in no transformers model",
                key="model.qk_norm",
                value=True,
                remedy="train without one of them to export to Hugging Face",
            )
        return "granite"
    if model.architecture == "llama" and model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"is no multiple of num_attention_heads = {model.num_attention_heads}, which transformers' Llama asks for",
            key="model.hidden_size",
            value=model.hidden_size,
            remedy="train another shape to export to Hugging Face",
        )
    return model.architecture


def model_config(target: Target, tokenizer: TokenizerFolder, dtype: str) -> dict[str, Any]:
    """``config.json`` for transformers 4.57 and 5."""
    model, kind = target.model, family(target.model)
    name = str(DTYPES[dtype]).removeprefix("torch.")
    config: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "hidden_act": "silu",
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "dtype": name,
        "torch_dtype": name,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "use_cache": True,
    }
    if kind != "qwen2":  # there q, k and v always have one
        config["attention_bias"] = model.attention_bias
    if kind in ("llama", "granite"):
        config["mlp_bias"] = False
    if kind == "granite":
        config |= {
            "embedding_multiplier": 1.0 if model.scale_emb is None else model.scale_emb,
            "residual_multiplier": 1.0 if model.residual_scale is None else model.residual_scale,
            "logits_scaling": 1.0 if model.logit_divisor is None else model.logit_divisor,
            "attention_multiplier": model.head_dim**-0.5,
        }
    return config


def export_hf(
    source: Path, out: Path | None = None, *, dtype: str | None = None, say: Callable[[str], None] = lambda line: None
) -> Exported:
    """Writes a checkpoint (or the newest good one of a run's folder) as a Hugging Face folder; whole or not at all.

    out: by default ``export/hf`` in the run's folder. dtype: ``fp32`` or ``bf16``; by default what the target keeps
    weights in. say: is told what a person should know: checkpoints passed over, and what a user's tokenizer does that
    training did not.

    Raises:
        UserError: no good checkpoint, a model that no transformers family computes, a folder that holds something else
            than an export, or a full disk.
    """
    found = checkpoint.resolve(source, warn=say)
    target = parse_target(found.manifest["target"], file=found.path / checkpoint.MANIFEST)
    tokenizer = open_tokenizer(found.path / checkpoint.TOKENIZER, target.model)
    dtype = dtype or target.precision.kept
    config = model_config(target, tokenizer, dtype)
    out = out or found.path.parent.parent / "export" / "hf"
    _require_replaceable(out)
    if added := tokenizer.tokenizer.encode("").tokens:
        say(
            f"the tokenizer adds {' '.join(added)} to every text, which training did not: so will programs that use "
            "the export, unless they are told add_special_tokens=False"
        )
    with new_folder(out) as folder:
        _write_weights(folder, found.path, target.model, config, DTYPES[dtype])
        write_json(folder / "config.json", config)
        stops = [token for token in (tokenizer.eos, tokenizer.im_end) if token is not None]
        write_json(
            folder / "generation_config.json",
            {
                "bos_token_id": tokenizer.bos,
                "eos_token_id": list(dict.fromkeys(stops)),
                "pad_token_id": tokenizer.pad,
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.95,
            },
        )
        _write_tokenizer(folder, tokenizer)
        files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
        facts = {"forgetrain": forgetrain.__version__, "target": target.name, "step": found.step}
        write_json(folder / RECORD, facts | {"files": files})
    parameters = sum(torch.Size(shape).numel() for shape in target.model.parameter_shapes().values())
    return Exported(out, found.path, found.step, config["architectures"][0], parameters, dtype)


def _require_replaceable(out: Path) -> None:
    """Raises UserError when ``out`` holds anything but what an export wrote and nobody changed: it would be gone."""
    record = out / RECORD
    found = read_json(record, "name a new folder with --out") if record.is_file() else None
    files = found["files"] if isinstance(found, dict) and "forgetrain" in found else {}
    present = sorted(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    foreign = [
        path.name
        for path in present
        if not (path == record and files) and not (path.is_file() and sha256_file(path) == files.get(path.name))
    ]
    if foreign:
        raise UserError(
            f"holds what no export wrote there: {', '.join(foreign[:3])}",
            file=out,
            remedy="name a new folder with --out, or move this one away",
        )


def _write_weights(folder: Path, source: Path, model: Model, config: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = model.parameter_shapes()
    groups = list(_groups(shapes, dtype.itemsize))
    index: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weights = checkpoint.read_masters(source, {name: shapes[name] for name in names})
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        if config.get("attention_bias") and number == 1:
            weights |= _zero_output_biases(model, dtype)
        with no_space_named(folder.with_name(folder.name.removeprefix(".").removesuffix(".partial"))):
            save_file(weights, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(weights, file)
    if len(groups) > 1:
        size = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": index})


def _groups(shapes: dict[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most SHARD_BYTES (or of one tensor)."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        bytes_ = torch.Size(shape).numel() * itemsize
        if group and size + bytes_ > SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += bytes_
    yield group


def _zero_output_biases(model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """With ``attention_bias`` transformers' Llama, Qwen3 and Granite have a bias on o too; having none is zero."""
    return {
        f"model.layers.{i}.self_attn.o_proj.bias": torch.zeros(model.hidden_size, dtype=dtype)
        for i in range(model.num_hidden_layers)
    }


def _write_tokenizer(folder: Path, tokenizer: TokenizerFolder) -> None:
    """The tokenizer's files; in its settings the target's special tokens, whatever they named, and ChatML where it has
    the tokens for it and brought no template."""
    for path in tokenizer.folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        write_json(settings, {"tokenizer_class": "PreTrainedTokenizerFast"})
    text, ids = tokenizer.tokenizer.id_to_token, {"eos": tokenizer.eos, "bos": tokenizer.bos, "pad": tokenizer.pad}
    tokens = {f"{name}_token": text(token) for name, token in ids.items() if token is not None}
    for path in (settings, folder / "special_tokens_map.json"):  # transformers 4 lets the second overrule the first
        if path.is_file():
            named = read_json(path, "export again")
            write_json(path, named | {key: token for key, token in tokens.items() if _text(named.get(key)) != token})
    named = read_json(settings, "export again")
    has_template = "chat_template" in named or (folder / "chat_template.jinja").is_file()
    if not has_template and tokenizer.tokenizer.token_to_id(IM_START) is not None:
        write_json(settings, named | {"chat_template": CHAT_TEMPLATE})


def _text(token: Any) -> Any:
    """A special token is named by its text, or by an object that has it as its content."""
    return token.get("content") if isinstance(token, dict) else token
