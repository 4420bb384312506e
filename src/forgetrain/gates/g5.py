"""G5: trained in pairs from the same weights on the same data, candidate and reference lose the same.

    statistic = |mean over seeds and steps of (candidate's loss - reference's loss)|
    threshold = max(relative · mean of the reference's loss, band_factor · band)

where ``band`` is the same statistic between known-good variants, which differ in rounding alone. Two-sided: a loss
that is lower than it should be is a defect too. A gate of 1% passed 7 of 8 planted defects, hence 5e-4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from forgetrain.gates.verdict import Verdict


def mean_delta(candidate: Sequence[Sequence[float]], reference: Sequence[Sequence[float]]) -> float:
    """Mean over seeds and steps of candidate minus reference; NaN when a loss is not finite.

    Raises:
        ValueError: other seeds or steps in one than in the other.
    """
    pairs = [
        (c, r) for mine, theirs in zip(candidate, reference, strict=True) for c, r in zip(mine, theirs, strict=True)
    ]
    if not all(math.isfinite(c) and math.isfinite(r) for c, r in pairs):
        return math.nan
    return math.fsum(c - r for c, r in pairs) / len(pairs)


def g5(
    candidate: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]],
    known_good: Sequence[Sequence[Sequence[float]]],
    *,
    relative: float = 5e-4,
    band_factor: float = 3.0,
    seeds: int = 3,
    sandboxed: bool = False,
) -> Verdict:
    """``candidate[seed][step]`` and ``reference[seed][step]`` are losses of paired runs; ``known_good`` are such runs
    of variants that are known to be right."""
    if len(reference) < seeds or len(candidate) != len(reference):
        text = f"{len(candidate)} seeds were trained, {max(seeds, len(reference))} are needed"
        return Verdict("G5", False, len(candidate), seeds, explanation=text, sandboxed=sandboxed)
    delta = mean_delta(candidate, reference)
    band = max((abs(mean_delta(variant, reference)) for variant in known_good), default=0.0)
    losses = [loss for run in reference for loss in run]
    threshold = max(relative * math.fsum(losses) / len(losses), band_factor * band)
    per_seed = [mean_delta([mine], [theirs]) for mine, theirs in zip(candidate, reference, strict=True)]
    passed = math.isfinite(delta) and math.isfinite(threshold) and abs(delta) <= threshold
    text = f"mean difference of the loss {delta:+.3g} over {len(reference)} seeds, {threshold:.3g} allowed either way"
    if math.isnan(delta):
        text = "a loss is not finite"
    return Verdict(
        "G5",
        passed,
        abs(delta),
        threshold,
        threshold - abs(delta),
        detail={"delta": delta, "per_seed": per_seed, "band": band},
        explanation=text,
        sandboxed=sandboxed,
    )
