"""Tiny targets of every architecture, and batches for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from forgetrain.spec.target import Target, parse_target

if TYPE_CHECKING:
    from forgetrain.engine.contract import Batch

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
RECIPE = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 16, "steps": 6, "lr": 1e-2}
GATES = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 16, "steps": 4}

#: One model of each kind that ForgeTrain must align; the first is MiniCPM5's shape (q width ≠ hidden, GQA, untied).
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "minicpm5": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "minicpm4": {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16},
}


def tiny_target(architecture: str = "minicpm5", **sections: dict[str, Any]) -> Target:
    """A target of this architecture; ``sections`` update its sections, for example ``precision={"dtype": "bf16"}``."""
    tree: dict[str, Any] = {
        "name": f"tiny-{architecture}",
        "model": {**MODEL, **ARCHITECTURES[architecture]},
        "recipe": RECIPE,
        "gates": GATES,
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_target(tree)


def random_batch(target: Target, seed: int, *, documents: bool = False) -> Batch:
    """Random tokens at the recipe's shape, the last label masked; with ``documents``, cut in the middle of each row."""
    import torch  # processes that tests start by the dozen want a target alone

    from forgetrain.engine.contract import make_batch

    n, s = target.recipe.batch_size, target.recipe.sequence_length
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, target.model.vocab_size, (n, s + 1), generator=generator)
    mask = torch.ones(n, s)
    mask[0, -1] = 0.0
    boundaries = torch.arange(n) * s + s // 2 - 1 if documents else None
    return make_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, boundaries)
