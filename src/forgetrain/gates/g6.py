"""G6: a longer run on real data with a hidden seed: held-out loss, final weights, and the candidate against itself.

- held-out loss inside the band that the reference's own seeds span, widened by half its width on both sides, since
  three to five seeds seldom show the extremes;
- distance of the final weights from the reference's, relative to how far training moved them, within the budget;
- the candidate twice: equal bit for bit, or declared non-deterministic and within the band that it declared.

Where nothing but a distance is over its budget, and not by far, that may be the seed's doing: rounding leads most
trainings a little way, and one in a hundred a hundred times as far, another one for each engine. The candidate must
pass with two more seeds then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from forgetrain.gates.verdict import Verdict, share_of
from forgetrain.numerics.compare import exact

#: How many times its budget a distance may be for a seed to be to blame.
EXCUSED = 10.0


@dataclass(frozen=True)
class Repeat:
    """The candidate run twice. distance: 0 of equal runs. declared_band: None for an engine that says it is
    deterministic, else the largest relative weight distance between two of its runs that it declares."""

    first_hash: str
    second_hash: str
    distance: float
    declared_band: float | None = None


def weight_distance(
    found: Mapping[str, Tensor], reference: Mapping[str, Tensor], start: Mapping[str, Tensor], device: str = "cpu"
) -> float:
    """‖found - reference‖ / ‖reference - start‖ over all weights, in float64 on ``device``: 0 is equal, 1 as far as
    training went.

    Raises:
        KeyError: a weight is missing.
    """

    def squares(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str) -> float:
        return float((exact(one[name], device) - exact(other[name], device)).square().sum())

    apart = math.fsum(squares(found, reference, name) for name in reference)
    moved = math.fsum(squares(reference, start, name) for name in reference)
    if moved == 0.0:
        return 0.0 if apart == 0.0 else math.inf
    return math.sqrt(apart / moved)


def g6(
    held_out: float,
    reference_held_out: Sequence[float],
    distance: float,
    repeat: Repeat,
    *,
    distance_budget: float,
    sandboxed: bool = False,
) -> Verdict:
    """``held_out``: the candidate's loss with the hidden seed; ``reference_held_out``: the reference's over seeds, the
    hidden one first. ``distance``: ``weight_distance`` from the reference of the hidden seed; ``distance_budget``: what
    known-good variants reach, times the gate's factor."""
    if len(reference_held_out) < 2:
        return Verdict("G6", False, explanation="one seed of the reference spans no band", sandboxed=sandboxed)
    low, high = min(reference_held_out), max(reference_held_out)
    centre, reach = (low + high) / 2, high - low
    band = repeat.declared_band
    # by name: whether it passed, whether rounding may have led there, and that in words
    checks: dict[str, tuple[bool, bool, str]] = {
        "held-out loss": (
            abs(held_out - centre) <= reach,
            False,
            f"held-out loss {held_out:.6g}, the seeds span {low:.6g} to {high:.6g}",
        ),
        "weights": (
            distance <= distance_budget,
            distance <= EXCUSED * distance_budget,
            f"weights {distance:.3g} of training's way from the reference's, {distance_budget:.3g} allowed",
        ),
        "repeat": _repeat(repeat),
    }
    failed = [name for name, (passed, _, _) in checks.items() if not passed]
    used = max(share_of(abs(held_out - centre), reach), share_of(distance, distance_budget))
    if band is not None:
        used = max(used, share_of(repeat.distance, band))
    detail: dict[str, Any] = {
        name: {"pass": passed, "text": text, "rounding": rounding} for name, (passed, rounding, text) in checks.items()
    }
    return Verdict(
        "G6",
        not failed,
        used,
        1.0,
        1.0 - used,
        first_divergence=failed[0] if failed else None,
        detail=detail,
        explanation="; ".join(checks[name][2] for name in failed or checks),
        sandboxed=sandboxed,
    )


def by_rounding(verdict: Verdict) -> bool:
    """Whether it failed by distances alone, as rounding can lead to."""
    failed = [check for check in verdict.detail.values() if not check["pass"]]
    return bool(failed) and all(check["rounding"] for check in failed)


def of_seeds(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of the first seed's and of those that were asked for because it failed: passed if these are. Its
    number is the one that decided, the worst of the others'."""
    if len(verdicts) == 1:
        return verdicts[0]
    failed = [verdict for verdict in verdicts[1:] if not verdict.passed]
    decisive = failed[0] if failed else max(verdicts[1:], key=lambda verdict: verdict.statistic or 0.0)
    return replace(
        decisive,
        detail={"seeds": [verdict.detail for verdict in verdicts]},
        explanation="; ".join(f"seed {number}: {each.explanation}" for number, each in enumerate(verdicts, 1)),
        sandboxed=all(verdict.sandboxed for verdict in verdicts),
    )


def _repeat(repeat: Repeat) -> tuple[bool, bool, str]:
    band = repeat.declared_band
    if repeat.first_hash == repeat.second_hash:
        return True, False, "run twice, bit for bit equal"
    if band is None:
        return False, False, "run twice, its weights differ, and it does not say that it is non-deterministic"
    text = f"declared non-deterministic: two runs are {repeat.distance:.3g} apart, {band:.3g} declared"
    return repeat.distance <= band, repeat.distance <= EXCUSED * band, text
