"""The learning rate of every step: a pure function of the recipe.

learning_rate(target.recipe, step)          # step 0 is the first
"""

from __future__ import annotations

import math

from forgetrain.errors import UserError
from forgetrain.spec.target import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step ``step``, counted from 0; steps at or beyond ``recipe.steps`` get ``min_lr``.

    The rate rises linearly over ``warmup_steps``, the first step getting lr / warmup_steps, the last lr. Then
    ``constant`` stays; ``cosine`` falls to ``min_lr`` over the remaining steps; ``wsd`` (MiniCPM, Hu et al. 2024)
    stays until the last ``decay_steps`` and falls over them: ``linear``, ``exponential``, or as 1 - sqrt(t) (Hägele
    et al. 2024). A falling rate would reach ``min_lr`` at step ``recipe.steps``, so that the last step still learns.

    Raises:
        UserError: an exponential decay to zero, which no factor reaches.
    """
    lr, low = recipe.lr, recipe.min_lr
    if step < recipe.warmup_steps:
        return lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return lr
    if recipe.schedule == "cosine":
        length = recipe.steps - recipe.warmup_steps
        t = min((step - recipe.warmup_steps) / length, 1.0) if length else 1.0
        return low + (lr - low) * (1 + math.cos(math.pi * t)) / 2
    begins = recipe.steps - recipe.decay_steps
    if step < begins or recipe.decay_steps == 0:
        return lr
    t = min((step - begins) / recipe.decay_steps, 1.0)
    if recipe.decay == "linear":
        return lr + (low - lr) * t
    if recipe.decay == "1-sqrt":
        return low + (lr - low) * (1 - math.sqrt(t))
    if low == 0:
        raise UserError(
            "an exponential decay never reaches 0",
            key="recipe.min_lr",
            value=low,
            remedy="set it, for example to lr / 20",
        )
    return lr * (low / lr) ** t
