"""G7: the candidate is faster than the champion by more than the noise, and slower than the hardware allows.

Both run in alternating blocks of one run, so that what the machine does meanwhile meets both. The statistic is the
lower end of a bootstrap interval of ``total time of the champion / total time of the candidate``, resampled over pairs
of blocks; it must exceed 1 + max(minimum, 2σ), σ being the relative standard error of the champion's own blocks:
what an engine differs from itself. A figure above the roofline is a failure, not a record: something was not computed.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

from forgetrain.gates.verdict import Verdict

RESAMPLES = 2000
CONFIDENCE = 0.95
PAIRS = 5


def ratio_interval(champion: Sequence[float], candidate: Sequence[float]) -> tuple[float, float, float]:
    """(lower end, ratio, upper end) of champion's over candidate's time; one-sided ``CONFIDENCE`` at either end.

    The resampling is seeded: the same evidence gives the same verdict."""
    pairs = list(zip(champion, candidate, strict=True))
    draw = random.Random(0)
    ratios = sorted(_ratio(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    cut = int((1 - CONFIDENCE) * RESAMPLES)
    return ratios[cut], _ratio(pairs), ratios[-1 - cut]


def g7(
    champion: Sequence[float],
    candidate: Sequence[float],
    *,
    roofline_seconds: float,
    steps_per_block: int,
    minimum: float = 0.01,
    beat: bool = True,
    sandboxed: bool = False,
) -> Verdict:
    """``champion[i]`` and ``candidate[i]``: seconds of the i-th pair of blocks, each of ``steps_per_block`` steps;
    ``roofline_seconds``: the least time of one step on this hardware (``forgetrain estimate``). ``beat``: whether the
    champion must be beaten; without one the race is against a known-good engine, and only the impossible fails."""
    if len(champion) != len(candidate) or len(champion) < PAIRS:
        text = f"{len(champion)} and {len(candidate)} blocks were timed; {PAIRS} pairs are needed"
        return Verdict("G7", False, explanation=text, sandboxed=sandboxed)
    if not all(math.isfinite(t) and t > 0 for t in (*champion, *candidate)):
        return Verdict("G7", False, explanation="a block's time is not a positive number", sandboxed=sandboxed)
    fastest = min(candidate) / steps_per_block
    if fastest < roofline_seconds:
        return Verdict(
            "G7",
            False,
            fastest,
            roofline_seconds,
            fastest - roofline_seconds,
            explanation=f"a step of {fastest:.3g} s is faster than this hardware can be ({roofline_seconds:.3g} s): "
            "something was not computed or not timed",
            sandboxed=sandboxed,
        )
    low, ratio, high = ratio_interval(champion, candidate)
    sigma = statistics.stdev(champion) / statistics.fmean(champion) / math.sqrt(len(champion))
    threshold = 1.0 + max(minimum, 2.0 * sigma)
    detail = {"ratio": ratio, "low": low, "high": high, "sigma": sigma, "pairs": len(champion)}
    if not beat:
        text = f"{ratio:.3f} times a known-good engine's speed, between {low:.3f} and {high:.3f}; no champion to beat"
        return Verdict("G7", True, low, detail=detail, explanation=text, sandboxed=sandboxed)
    return Verdict(
        "G7",
        low > threshold,
        low,
        threshold,
        low - threshold,
        detail=detail,
        explanation=f"{ratio:.3f} times the champion's speed, between {low:.3f} and {high:.3f}; more than "
        f"{threshold:.3f} at the lower end is needed",
        sandboxed=sandboxed,
    )


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return math.fsum(champion for champion, _ in pairs) / math.fsum(candidate for _, candidate in pairs)
