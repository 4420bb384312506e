"""The update: from one state to the next AdamW, or Muon, did what the recipe says, judged by the engine's own moments.

The gradient of a step follows from the first moments, g = (m' - β₁ m) / (1 - β₁). With it the second moments and the
masters must be what the formula gives in float64, but for a few roundings of fp32; so a gradient's own error, however
large in bf16, plays no part, and skipping weight decay, a tensor, a bias correction or the master copy shows at once.

    v' = β₂ v + (1 - β₂) g²        w' = w - lr · (m' / (1 - β₁ᵗ) / (sqrt(v' / (1 - β₂ᵗ)) + ε) + λ w)

λ applies to tensors of two or more dimensions. A matrix that Muon steps is held against its iteration in float64:

    u = (1 - μ) g + μ m'               w' = w - lr · (0.2 sqrt(max(A, B)) · NS(u) + λ w)

torch.optim.Muon iterates in bf16, and small singular values magnify roundings. So what the gate's own iteration in bf16
is away measures what the matrix allows; scale and decay, which roundings leave alone, are looked at by themselves.

At a first step the clipped gradients' norm is the smaller of the norm that was returned and the recipe's limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from forgetrain.gates.verdict import Verdict
from forgetrain.numerics.compare import exact
from forgetrain.numerics.oracle import orthogonal
from forgetrain.spec.moments import by_muon
from forgetrain.spec.target import Recipe

#: Roundings allowed to honest code; each formula above has fewer than ten operations.
ROUNDINGS = 16.0
#: Of what Muon does to a matrix: the distance from float64, in distances of an iteration in bf16 (measured on nano-cpu,
#: two layers, four steps: torch.optim.Muon is at 0.35 to 0.65); the share of the step by which its scale may be off
#: (measured: 0.002); and that of the decay (measured: 0.07).
MUON_RATIO, MUON_SCALE, MUON_DECAY = 1.5, 0.01, 0.25
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
    device: str = "cpu",
    sandboxed: bool = False,
) -> Verdict:
    """``before`` and ``after`` are states of Shards around one applied step; ``grad_norm`` when it was the first.
    ``device``: where the formulas are computed.

    ``statistic``: the worst element's error, as a share of what rounding explains."""
    t = int(after["step"].tensor)
    if t != int(before["step"].tensor) + 1 or t < 1:
        return _verdict(math.inf, "step", f"the step counter went from {int(before['step'].tensor)} to {t}", sandboxed)
    worst, where, squares = 0.0, "", 0.0
    for key in before:
        kind, _, name = key.partition("/")
        if kind != "master":
            continue
        muon = by_muon(recipe, name, before[key].tensor.dim())
        kinds = ("master", "exp_avg") if muon else ("master", "exp_avg", "exp_avg_sq")
        pairs = [[exact(state[f"{kind}/{name}"].tensor, device) for state in (before, after)] for kind in kinds]
        errors, g = _muon_errors(pairs, lr, recipe) if muon else _errors(pairs, lr, t, recipe)
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
        text = f"{where} is not what the recipe gives from the engine's own moments: {worst:.3g} times what is allowed"
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


def _muon_errors(pairs: list[list[Tensor]], lr: float, recipe: Recipe) -> tuple[dict[str, float], Tensor]:
    """The same of a matrix that Muon steps. ``pairs``: masters and moving averages, each before and after, float64."""
    (w, w_after), (m, m_after) = pairs
    mu, decay = recipe.muon_momentum, lr * recipe.weight_decay
    g = (m_after - mu * m) / (1 - mu)
    u = (1 - mu) * g + mu * m_after
    rate = lr * 0.2 * max(w.shape) ** 0.5
    due = rate * orthogonal(u)
    size, error = float(due.norm()), (w - w_after) - due - decay * w
    own = float((rate * orthogonal(u.bfloat16()).double() - due).norm())
    rounding = ROUNDINGS * _EPS * float(w.norm())
    chance = 4 * float(error.norm()) * float(w.norm()) / w.numel() ** 0.5  # of an error that points along w by accident
    allowed = {
        "direction": MUON_RATIO * own + MUON_SCALE * size + rounding,
        "scale": MUON_SCALE * size + rounding,
        "decay": MUON_DECAY * decay * float(w.square().sum()) + chance + rounding * float(w.norm()),
    }
    found = {
        "direction": float(error.norm()),
        "scale": abs(float((error * due).sum())) / size if size else 0.0,
        "decay": abs(float((error * w).sum())),
    }
    shares = {what: found[what] / allowed[what] if allowed[what] else math.inf for what in found}
    return {f"master ({what})": share if math.isfinite(share) else math.inf for what, share in shares.items()}, g


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
