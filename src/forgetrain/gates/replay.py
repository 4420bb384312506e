"""G7.replay: a block of the timed run, chosen by the judge afterwards, again on the reference from the same state.

The distance of two outcomes is the larger of the largest relative difference of a loss, and, over kinds of parameter,
‖Δm - Δm_reference‖ / ‖Δm_reference‖, where Δm is what the block added to the first moments: a weighted sum of its
clipped gradients. A known-good engine replays the block too, and the candidate may be a few times as far away as that
one: the threshold measures itself at any shape, dtype and moment of training. So a candidate that is right where
gates look at single steps cannot leave work out where it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from forgetrain.gates.verdict import Verdict
from forgetrain.spec.moments import average_decay
from forgetrain.spec.taps import kind_of
from forgetrain.spec.target import Recipe

FACTOR = 4.0
#: Where the known-good engine happens to equal the reference: far above rounding, far below any work left out.
FLOOR = {"fp32": 1e-3, "bf16": 3e-2}

Outcome = tuple[Sequence[float], Mapping[str, Any]]


def replay_distance(
    before: Mapping[str, Any], found: Outcome, due: Outcome, recipe: Recipe, steps: int
) -> dict[str, float]:
    """Distance by kind of parameter, and of the losses under ``loss``. Outcomes are (losses, state after)."""
    apart: dict[str, float] = {}
    size: dict[str, float] = {}
    for key in before:
        if key.startswith("exp_avg/"):
            kind = kind_of(key.removeprefix("exp_avg/"))
            old, mine, theirs = (state[key].tensor.double() for state in (before, found[1], due[1]))
            apart[kind] = apart.get(kind, 0.0) + float((mine - theirs).square().sum())
            kept = average_decay(recipe, key.removeprefix("exp_avg/"), old.dim()) ** steps
            size[kind] = size.get(kind, 0.0) + float((theirs - kept * old).square().sum())
    distances = {kind: math.sqrt(apart[kind] / size[kind]) if size[kind] else math.inf for kind in apart}
    pairs = list(zip(found[0], due[0], strict=True))
    # a loss is a mean over many tokens: its error is far smaller than that of a gradient
    apart_by = [abs(mine - theirs) / abs(theirs) for mine, theirs in pairs]
    # max() passes over a NaN that is not the first
    distances["loss"] = max(apart_by) if all(map(math.isfinite, apart_by)) else math.inf
    return {kind: distance if math.isfinite(distance) else math.inf for kind, distance in distances.items()}


def replay(
    candidate: Mapping[str, float],
    known_good: Mapping[str, float],
    *,
    precision: str,
    steps: tuple[int, int],
    sandboxed: bool = False,
) -> Verdict:
    """``statistic``: the worst kind's distance as a share of what it may be."""
    floors = {kind: FLOOR[precision] * (0.1 if kind == "loss" else 1.0) for kind in candidate}
    allowed = {kind: max(FACTOR * known_good[kind], floors[kind]) for kind in candidate}
    worst = max(candidate, key=lambda kind: candidate[kind] / allowed[kind])
    used = candidate[worst] / allowed[worst]
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
