"""The update: from one state to the next AdamW did what the recipe says, judged by the engine's own moments.

The gradient of a step follows from the first moments, g = (m' - β₁ m) / (1 - β₁). With it the second moments and the
masters must be what the formula gives in float64, but for a few roundings of fp32; so a gradient's own error, however
large in bf16, plays no part, and skipping weight decay, a tensor, a bias correction or the master copy shows at once.

    v' = β₂ v + (1 - β₂) g²        w' = w - lr · (m' / (1 - β₁ᵗ) / (sqrt(v' / (1 - β₂ᵗ)) + ε) + λ w)

λ applies to tensors of two or more dimensions. At a first step the clipped gradients' norm is the smaller of the norm
that was returned and the recipe's limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from forgetrain.gates.verdict import Verdict
from forgetrain.spec.target import Recipe

#: Roundings allowed to honest code; each formula above has fewer than ten operations.
ROUNDINGS = 16.0
_EPS = torch.finfo(torch.float32).eps
#: Relative error allowed to the norm of all gradients: fp32 sums over many tensors.
_NORM = 1e-4


def update(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    lr: float,
    recipe: Recipe,
    *,
    grad_norm: float | None = None,
    sandboxed: bool = False,
) -> Verdict:
    """``before`` and ``after`` are states of Shards around one applied step; ``grad_norm`` when it was the first.

    ``statistic``: the worst element's error, as a share of what rounding explains."""
    t = int(after["step"].tensor)
    if t != int(before["step"].tensor) + 1:
        return _verdict(math.inf, "step", f"the step counter went from {int(before['step'].tensor)} to {t}", sandboxed)
    worst, where, squares = 0.0, "", 0.0
    for key in before:
        kind, _, name = key.partition("/")
        if kind != "master":
            continue
        kinds = ("master", "exp_avg", "exp_avg_sq")
        pairs = [[state[f"{kind}/{name}"].tensor.double() for state in (before, after)] for kind in kinds]
        errors, g = _errors(pairs, lr, t, recipe)
        squares += float(g.square().sum())
        for what, share in errors.items():
            if not share <= worst:
                worst, where = share, f"{what}/{name}"
    if grad_norm is not None:
        wanted = min(grad_norm, recipe.clip)
        share = abs(math.sqrt(squares) - wanted) / (_NORM * wanted) if wanted > 0 else math.inf
        if not share <= worst:
            worst, where = share, "grad_norm"
    text = f"the update follows from the moments: at most {worst:.2g} of the rounding allowed, in {where}"
    if not worst <= 1.0:
        text = f"{where} is not what AdamW gives from the engine's own moments: {worst:.3g} times the rounding allowed"
    return _verdict(worst, where, text, sandboxed)


def _errors(pairs: list[list[Tensor]], lr: float, t: int, recipe: Recipe) -> tuple[dict[str, float], Tensor]:
    """The largest error over its allowance, for the second moments and for the masters; and the gradient. ``pairs``:
    masters, first and second moments, each before and after, float64."""
    (w, w_after), (m, m_after), (v, v_after) = pairs
    b1, b2 = recipe.beta1, recipe.beta2
    g = (m_after - b1 * m) / (1 - b1)
    unsure = ROUNDINGS * _EPS * (m_after.abs() + m.abs()) / (1 - b1)  # g is a difference of rounded numbers
    v_due = b2 * v + (1 - b2) * g.square()
    v_allowed = ROUNDINGS * _EPS * v_due + (1 - b2) * (2 * g.abs() * unsure + unsure.square()) + 1e-40
    decay = recipe.weight_decay if w.dim() >= 2 else 0.0
    moved = lr * (m_after / (1 - b1**t) / ((v_after / (1 - b2**t)).sqrt() + recipe.eps) + decay * w)
    w_allowed = ROUNDINGS * _EPS * (moved.abs() + lr * decay * w.abs()) + 2 * _EPS * (w.abs() + w_after.abs()) + 1e-40
    return {
        "exp_avg_sq": _largest((v_after - v_due).abs() / v_allowed),
        "master": _largest((w_after - (w - moved)).abs() / w_allowed),
    }, g


def _largest(shares: Tensor) -> float:
    return float(torch.nan_to_num(shares, nan=math.inf).max()) if shares.numel() else 0.0


def _verdict(worst: float, where: str, text: str, sandboxed: bool) -> Verdict:
    passed = worst <= 1.0
    return Verdict(
        "G4.update",
        passed,
        worst,
        1.0,
        1.0 - worst,
        first_divergence=None if passed else where,
        explanation=text,
        sandboxed=sandboxed,
    )
