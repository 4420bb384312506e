"""G4: against the float64 oracle a candidate errs no more than a small multiple of what the reference errs.

Errors are pooled by kind of tensor (``spec.taps.kind_of``) over layers, micro-batches and batches:

    rms(kind) = sqrt(sum of (value - oracle)² / number of values)
    passed when rms_candidate ≤ max(ratio · rms_reference, FLOOR_EPS · eps(dtype) · rms of the oracle's values)

Why these numbers: pooled RMS varies by a few percent between honest variants, where a single largest element varies by
factors, so max-abs only flags. A wrong eps or RoPE base moves fp32 errors by orders of magnitude, so 2 is loose enough
for a different order of sums and tight enough for defects; bf16 hides more, hence 1.5. Where the reference happens to
be exact (a copy, a sum of two numbers) a few eps keep honest code from failing. Scalars are left to G5.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetrain.gates.verdict import Verdict
from forgetrain.numerics.compare import exact
from forgetrain.spec.taps import kind_of

FLOOR_EPS = 4.0
BATCHES = 4
#: A largest error this many times the pooled one of the reference is worth a look; it fails nothing.
FLAG = 100.0


@dataclass
class _Pool:
    squared_error: float = 0.0
    squared_value: float = 0.0
    count: int = 0
    largest: float = 0.0
    eps: float = 0.0

    @property
    def rms(self) -> float:
        return math.sqrt(self.squared_error / self.count)

    @property
    def value(self) -> float:
        return math.sqrt(self.squared_value / self.count)


class ErrorPool:
    """Accumulates errors of one engine against the oracle, batch after batch; keeps sums, never tensors."""

    def __init__(self) -> None:
        self.kinds: dict[str, _Pool] = {}
        self.batches = 0

    @property
    def relative(self) -> float:
        """‖error‖ / ‖value‖ over all that was added."""
        pools = self.kinds.values()
        return math.sqrt(math.fsum(p.squared_error for p in pools) / math.fsum(p.squared_value for p in pools))

    def add_batch(self, oracle: Iterable[tuple[str, Tensor]], values: Iterable[tuple[str, Tensor]]) -> None:
        """Both streams name the same tensors in the same order; the oracle's are float64, and errors are computed where
        they lie.

        Raises:
            ValueError: names or shapes do not fit.
        """
        self.batches += 1
        for (name, due), (found, value) in zip(oracle, values, strict=True):
            if name != found or due.shape != value.shape:
                raise ValueError(f"the oracle has {name} {list(due.shape)}, the engine {found} {list(value.shape)}")
            if due.numel() <= 1:
                continue
            pool = self.kinds.setdefault(kind_of(name), _Pool())
            error = exact(value, due.device) - due
            pool.squared_error += float(error.square().sum())
            pool.squared_value += float(due.square().sum())
            pool.count += due.numel()
            pool.largest = max(pool.largest, float(error.abs().max()))
            pool.eps = max(pool.eps, torch.finfo(value.dtype).eps)


def g4(candidate: ErrorPool, reference: ErrorPool, *, ratio: float, sandboxed: bool = False) -> Verdict:
    """``ratio``: [gates] g4_fp32_ratio or g4_bf16_ratio. ``statistic``: the worst kind's error over what it may be
    without the floor, as a multiple of the reference's error."""
    if set(candidate.kinds) != set(reference.kinds) or not reference.kinds:
        odd = sorted(set(candidate.kinds) ^ set(reference.kinds))[:1]
        return _refused(f"the candidate and the reference were not measured on the same tensors {odd}", sandboxed)
    if min(candidate.batches, reference.batches) < BATCHES:
        return _refused(f"{candidate.batches} batches were measured, {BATCHES} are needed", sandboxed)
    rows, flags = {}, []
    for kind, mine in candidate.kinds.items():
        theirs = reference.kinds[kind]
        allowed = max(ratio * theirs.rms, FLOOR_EPS * mine.eps * theirs.value)
        used = _over(mine.rms, allowed)
        rows[kind] = {"rms": mine.rms, "reference": theirs.rms, "allowed": allowed, "used": used}
        if mine.largest > FLAG * max(theirs.rms, mine.eps * theirs.value) and mine.largest > theirs.largest * FLAG:
            flags.append(kind)
    worst = max(rows, key=lambda kind: rows[kind]["used"])
    failing = [kind for kind, row in rows.items() if not row["used"] <= 1.0]
    passed, row = not failing, rows[worst]
    text = (
        f"{worst} uses most of its error budget: RMS error {row['rms']:.3g} of {row['allowed']:.3g} allowed, the "
        f"reference errs {row['reference']:.3g}"
    )
    if failing:
        text = f"{len(failing)} of {len(rows)} kinds of tensor err more than allowed; {text}"
    return Verdict(
        "G4",
        passed,
        row["used"],
        1.0,
        1.0 - row["used"],
        first_divergence=failing[0] if failing else None,
        detail={"kinds": rows, "flagged": flags, "ratio": ratio, "batches": candidate.batches},
        explanation=text,
        sandboxed=sandboxed,
    )


def _over(error: float, allowed: float) -> float:
    """The share of the allowance that is used; infinite for an error that is not finite."""
    if not math.isfinite(error):
        return math.inf
    if allowed == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / allowed


def _refused(why: str, sandboxed: bool) -> Verdict:
    return Verdict("G4", False, explanation=why, sandboxed=sandboxed)
