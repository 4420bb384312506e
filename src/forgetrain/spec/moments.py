"""Which optimizer steps a parameter, and the moments it has: pure functions of the recipe.

    by_muon(target.recipe, "model.layers.0.mlp.up_proj.weight", 2)      # True with recipe.optimizer = "muon"
    state_shapes(target)["exp_avg/model.norm.weight"]

``exp_avg`` is a moving average of the clipped gradients: AdamW's with beta1, Muon's with muon_momentum. ``exp_avg_sq``
is AdamW's alone.
"""

from __future__ import annotations

from forgetrain.spec.target import Recipe, Target


def by_muon(recipe: Recipe, name: str, dimensions: int) -> bool:
    """Whether Muon steps this parameter: a matrix of a layer. Embedding, head and vectors are AdamW's."""
    return recipe.optimizer == "muon" and name.startswith("model.layers.") and dimensions == 2


def average_decay(recipe: Recipe, name: str, dimensions: int) -> float:
    """What ``exp_avg`` of this parameter keeps of itself in a step."""
    return recipe.muon_momentum if by_muon(recipe, name, dimensions) else recipe.beta1


def state_shapes(target: Target) -> dict[str, tuple[int, ...]]:
    """Every tensor of an engine's state, by kind and in the order of the parameters; ``step`` is the last."""
    parameters = target.model.parameter_shapes()
    shapes = {f"{kind}/{name}": shape for kind in ("master", "exp_avg") for name, shape in parameters.items()}
    second = {
        f"exp_avg_sq/{name}": shape
        for name, shape in parameters.items()
        if not by_muon(target.recipe, name, len(shape))
    }
    return {**shapes, **second, "step": ()}
