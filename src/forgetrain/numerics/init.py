"""Initial weights: a pure function of the model and a seed, the same for references, engines and training."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from forgetrain.spec.target import Model


def initial_weights(model: Model, seed: int) -> dict[str, Tensor]:
    """Canonical name → fp32 tensor. Norms start at one, biases at zero, matrices normal(0, initializer_range); those
    that end a residual branch are scaled by 1 / sqrt(2 * layers), as GPT-2 and Megatron do.

    Each tensor has its own generator, seeded by (seed, name), so that no tensor depends on which others exist.
    """
    weights = {}
    for name, shape in model.parameter_shapes().items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape)
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            std = model.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * model.num_hidden_layers) ** 0.5
            weights[name] = torch.randn(shape, generator=generator) * std
    return weights
