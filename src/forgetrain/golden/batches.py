"""Batches for gates: random tokens, a pure function of a seed and a step."""

from __future__ import annotations

import torch

from forgetrain.engine.contract import Batch, make_batch
from forgetrain.spec.target import Target


def random_batch(target: Target, seed: int, step: int) -> Batch:
    """A batch at the recipe's shape. Some of the loss mask is zero, and where the target minds documents each row holds
    several, so that no gate passes on an engine that leaves either out."""
    recipe = target.recipe
    n, s = recipe.batch_size, recipe.sequence_length
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    tokens = torch.randint(0, target.model.vocab_size, (n, s + 1), generator=generator)
    mask = (torch.rand(n, s, generator=generator) >= 0.03).float()
    mask[:, 0] = 1.0  # a row of zeros alone would be no row
    boundaries = None
    if target.data.documents != "ignore":
        boundaries = torch.nonzero(torch.rand(n * s, generator=generator) < 4 / s).flatten()
    return make_batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, boundaries)
