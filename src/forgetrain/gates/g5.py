"""G5: trained in pairs from the same weights on the same data, candidate and reference lose the same.

    statistic = |mean over seeds and steps of (candidate's loss - reference's loss)|
    threshold = max(relative · mean of the reference's loss, t · band)

where ``band`` is how far rounding alone leads the mean over seeds, as its standard error: from the paired runs of
known-good variants, each seed of each one sample about zero. ``t`` is Student's, as rare for so few samples as
``band_factor`` is for a known spread. (The mean of one variant's three seeds was the band once: two such means are as
far apart as 3 to 1 in a fifth of all cases, and where a training is chaotic, as nano-cpu's at its gates' shape, an
honest engine was rejected by it.) Two-sided: a loss that is lower than it should be is a defect too. A gate of 1%
passed 7 of 8 planted defects, hence 5e-4.
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


def band_of(known_good: Sequence[Sequence[Sequence[float]]], reference: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The band and how many samples it is from. A variant that equals the reference in every bit says nothing of
    rounding and is none; NaN when a loss is not finite."""
    samples: list[float] = []
    for variant in known_good:
        apart = [mean_delta([mine], [theirs]) for mine, theirs in zip(variant, reference, strict=True)]
        samples += apart if any(apart) else []
    if not samples:
        return 0.0, 0
    return math.sqrt(math.fsum(each * each for each in samples) / len(samples) / len(reference)), len(samples)


def students(z: float, samples: int) -> float:
    """What Student's t of so many degrees of freedom exceeds as rarely as a normal variable does ``z``: Cornish and
    Fisher's expansion, Abramowitz and Stegun 26.7.5. Of 3 and more it is within a tenth for ``z`` up to 3."""
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / samples**power for power, term in enumerate(terms, 1))


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
    band, samples = band_of(known_good, reference)
    losses = [loss for run in reference for loss in run]
    allowed = students(band_factor, samples) * band if samples else 0.0
    threshold = max(relative * math.fsum(losses) / len(losses), allowed)
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
        detail={"delta": delta, "per_seed": per_seed, "band": band, "samples": samples},
        explanation=text,
        sandboxed=sandboxed,
    )
