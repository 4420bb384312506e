"""G7.replay: a block of the timed run, chosen by the judge afterwards, again on the reference from the same state.

The distance of two outcomes is the largest relative difference of a loss or of a gradient norm, and, over kinds of
parameter, ‖Δm - Δm_reference‖ / ‖Δm_reference‖, where Δm is what the block added to the first moments: a weighted sum
of its clipped gradients; the same of what it did to masters and second moments. A known-good engine replays the block
too, and the candidate may be a few times as far away as that one: the threshold measures itself at any shape, dtype and
moment of training. So a candidate that is right where gates look at single steps cannot leave work out where it is
timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from forgetrain.gates.verdict import Verdict
from forgetrain.numerics.compare import exact
from forgetrain.spec.moments import average_decay
from forgetrain.spec.taps import kind_of
from forgetrain.spec.target import Recipe

FACTOR = 4.0
#: Where the known-good engine happens to equal the reference: far above rounding, far below any work left out.
FLOOR = {"fp32": 1e-3, "bf16": 3e-2}
#: The same for masters and second moments, whose steps divide by, and consist of, the squares of small numbers.
_FLOOR_OF_STEPS = {"fp32": 1e-2, "bf16": 1e-1}
_STEPS = ("master", "exp_avg_sq")
#: Of a tensor, how many numbers are left out there: those whose gradient is rounding alone step either way.
_FEW = 4


class Outcome(NamedTuple):
    """Of a block: what its steps returned, and the state after it."""

    losses: Sequence[float]
    norms: Sequence[float]
    state: Mapping[str, Any]


def replay_distance(
    before: Mapping[str, Any], found: Outcome, due: Outcome, recipe: Recipe, steps: int, device: str = "cpu"
) -> dict[str, float]:
    """Distance of the first moments by kind of parameter, and of what was returned as ``loss`` and ``grad_norm``;
    computed on ``device``."""

    def kept(name: str, dimensions: int) -> float:
        return average_decay(recipe, name, dimensions) ** steps

    distances = _added(before, found, due, "exp_avg", kept, 0, device)
    pairs = {"loss": (found.losses, due.losses), "grad_norm": (found.norms, due.norms)}
    for name, (mine, theirs) in pairs.items():
        apart = [abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)]
        # max() passes over a NaN that is not the first
        distances[name] = max(apart) if all(map(math.isfinite, apart)) else math.inf
    return distances


def step_distance(before: Mapping[str, Any], found: Outcome, due: Outcome, device: str = "cpu") -> dict[str, float]:
    """Distance of what the block did to masters and second moments, by kind of parameter and state; on ``device``."""
    return {
        f"{kind}#{state}": distance
        for state in _STEPS
        for kind, distance in _added(before, found, due, state, lambda name, dimensions: 1.0, _FEW, device).items()
    }


def _added(
    before: Mapping[str, Any],
    found: Outcome,
    due: Outcome,
    state: str,
    kept: Callable[[str, int], float],
    few: int,
    device: str,
) -> dict[str, float]:
    """By kind of parameter, how far what was added to this state is from what is due, relative to that.

    kept: what a tensor keeps of itself. few: how many numbers of a tensor, the worst, do not count."""
    apart: dict[str, float] = {}
    size: dict[str, float] = {}
    for key in before:
        if key.startswith(f"{state}/"):
            name = key.removeprefix(f"{state}/")
            old, mine, theirs = (exact(tensors[key].tensor, device) for tensors in (before, found.state, due.state))
            kind = kind_of(name)
            square = (mine - theirs).square().flatten()
            worst = square.topk(min(few, len(square))).values
            apart[kind] = apart.get(kind, 0.0) + float((square.sum() - worst.sum()).clamp(min=0.0))
            size[kind] = size.get(kind, 0.0) + float((theirs - kept(name, old.dim()) * old).square().sum())
    return {kind: _relative(apart[kind], size[kind]) for kind in apart}


def _relative(apart: float, size: float) -> float:
    """Of sums of squares. Where nothing is due, nothing is right."""
    if not size:
        return 0.0 if apart == 0.0 else math.inf
    share = apart / size
    return math.sqrt(share) if math.isfinite(share) else math.inf


def replay(
    candidate: Mapping[str, float],
    known_good: Mapping[str, float],
    *,
    precision: str,
    steps: tuple[int, int],
    sandboxed: bool = False,
) -> Verdict:
    """``statistic``: the worst kind's distance as a share of what it may be."""
    allowed = {kind: max(FACTOR * known_good[kind], _floor(kind, precision)) for kind in candidate}
    # what is not finite is wrong, however far the known-good engine is
    shares = {kind: far / allowed[kind] if math.isfinite(far) else math.inf for kind, far in candidate.items()}
    worst = max(shares, key=lambda kind: shares[kind])
    used = shares[worst]
    passed = used <= 1.0
    return Verdict(
        "G7.replay",
        passed,
        used,
        1.0,
        1.0 - used,
        first_divergence=None if passed else worst,
        detail={"candidate": dict(candidate), "known_good": dict(known_good), "steps": list(steps)},
        explanation=f"steps {steps[0]} to {steps[1] - 1} of the timed run, repeated by the reference: {worst} is "
        f"{candidate[worst]:.3g} away, {allowed[worst]:.3g} allowed",
        sandboxed=sandboxed,
    )


def _floor(kind: str, precision: str) -> float:
    if kind.partition("#")[2] in _STEPS:
        return _FLOOR_OF_STEPS[precision]
    # a loss is a mean over many tokens: its error is far smaller than that of a gradient
    return FLOOR[precision] * (0.1 if kind == "loss" else 1.0)
