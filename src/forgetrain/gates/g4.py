"""G4: against the float64 oracle a candidate errs no more than a small multiple of what the reference errs.

Errors are pooled by kind of tensor (``spec.taps.kind_of``) over layers, micro-batches and batches:

    rms(kind) = sqrt(sum of (value - oracle)² / number of values)
    passed when rms_candidate ≤ max(ratio · rms_reference, FLOOR_EPS · eps(dtype) · rms of the oracle's values)

Why these numbers: pooled RMS varies by a few percent between honest variants, where a single largest element varies by
factors, so max-abs only flags. A wrong eps or RoPE base moves fp32 errors by orders of magnitude, so 2 is loose enough
for a different order of sums and tight enough for defects; bf16 hides more, hence 1.5. Where the reference happens to
be exact (a copy, a sum of two numbers) a few eps keep honest code from failing. Scalars are left to G5.

The global norm clips all gradients of a batch by one number. Where weights are wide and rounding is amplified, that
number errs more than the gradients of the head and the norm before it, which little happened to. Four batches are four
samples of it, and of two such fours one is twice the other in a tenth of all cases. So where a kind fails, the norms
that were returned are taken out of the gradients, and judged by themselves:

    passed when rms(kind, clipped by the oracle's norm) is within what is allowed above
    and rms over batches of the norm's relative error ≤ max(NORM_RATIO · the reference's, FLOOR_EPS · eps(dtype))
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from forgetrain.gates.verdict import Verdict, share_of
from forgetrain.numerics.compare import exact
from forgetrain.spec.taps import kind_of

FLOOR_EPS = 4.0
#: Of two sets of four numbers of one spread, one is this much larger than the other in 1 of 1,400 cases (F of 4 and 4).
NORM_RATIO = 8.0
BATCHES = 4
#: A largest error this many times the pooled one of the reference is worth a look; it fails nothing.
FLAG = 100.0


@dataclass
class _Pool:
    """squared_rest: of the errors as if the oracle's norm had clipped the values."""

    squared_error: float = 0.0
    squared_rest: float = 0.0
    squared_value: float = 0.0
    count: int = 0
    largest: float = 0.0
    eps: float = 0.0

    @property
    def rms(self) -> float:
        return math.sqrt(self.squared_error / self.count)

    @property
    def rest(self) -> float:
        return math.sqrt(self.squared_rest / self.count)

    @property
    def value(self) -> float:
        return math.sqrt(self.squared_value / self.count)


class ErrorPool:
    """Accumulates errors of one engine against the oracle, batch after batch; keeps sums, never tensors."""

    def __init__(self) -> None:
        self.kinds: dict[str, _Pool] = {}
        self.norms: list[float] = []  # relative error of each batch's

    @property
    def batches(self) -> int:
        return len(self.norms)

    @property
    def norm(self) -> float:
        """The root of the mean square over batches of the norm's relative error."""
        return math.sqrt(math.fsum(error * error for error in self.norms) / len(self.norms))

    @property
    def relative(self) -> float:
        """‖error‖ / ‖value‖ over all that was added."""
        pools = self.kinds.values()
        return math.sqrt(math.fsum(p.squared_error for p in pools) / math.fsum(p.squared_value for p in pools))

    def add_batch(
        self, oracle: Iterable[tuple[str, Tensor]], values: Iterable[tuple[str, Tensor]], norm: float = 0.0
    ) -> None:
        """Both streams name the same tensors in the same order; the oracle's are float64, and errors are computed where
        they lie. ``norm``: the relative error of the norm that clipped the values.

        Raises:
            ValueError: names or shapes do not fit.
        """
        self.norms.append(norm)
        for (name, due), (found, value) in zip(oracle, values, strict=True):
            if name != found or due.shape != value.shape:
                raise ValueError(f"the oracle has {name} {list(due.shape)}, the engine {found} {list(value.shape)}")
            if due.numel() <= 1:
                continue
            pool = self.kinds.setdefault(kind_of(name), _Pool())
            found_exactly = exact(value, due.device)
            error = found_exactly - due
            pool.squared_error += float(error.square().sum())
            pool.squared_value += float(due.square().sum())
            pool.count += due.numel()
            pool.largest = max(pool.largest, float(error.abs().max()))
            pool.eps = max(pool.eps, torch.finfo(value.dtype).eps)
            error.add_(found_exactly, alpha=norm)  # value · (1 + norm) - due
            pool.squared_rest += float(error.square().sum())


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
        used = share_of(mine.rms, allowed)
        rows[kind] = {"rms": mine.rms, "reference": theirs.rms, "allowed": allowed, "used": used, "rest": mine.rest}
        if mine.largest > FLAG * max(theirs.rms, mine.eps * theirs.value) and mine.largest > theirs.largest * FLAG:
            flags.append(kind)
    worst = max(rows, key=lambda kind: rows[kind]["used"])
    failing = [kind for kind, row in rows.items() if not row["used"] <= 1.0]
    row, eps = rows[worst], max(pool.eps for pool in candidate.kinds.values())
    allowed = max(NORM_RATIO * reference.norm, FLOOR_EPS * eps)
    norm = {"rms": candidate.norm, "reference": reference.norm, "allowed": allowed}
    detail = {"kinds": rows, "norm": norm, "flagged": flags, "ratio": ratio, "batches": candidate.batches}
    if failing:
        shares = {kind: share_of(row["rest"], row["allowed"]) for kind, row in rows.items()}
        of_norm = share_of(candidate.norm, allowed)
        if all(share <= 1.0 for share in (*shares.values(), of_norm)):
            kind = max(shares, key=lambda kind: shares[kind])
            used, errs = max(shares[kind], of_norm), rows[kind]
            text = (
                f"clipped by the oracle's norm {kind} uses most of its error budget: RMS error {errs['rest']:.3g} of "
                f"{errs['allowed']:.3g} allowed; the norm itself errs {candidate.norm:.2g} of {allowed:.2g} allowed"
            )
            return Verdict("G4", True, used, 1.0, 1.0 - used, detail=detail, explanation=text, sandboxed=sandboxed)
    text = (
        f"{worst} uses most of its error budget: RMS error {row['rms']:.3g} of {row['allowed']:.3g} allowed, the "
        f"reference errs {row['reference']:.3g}"
    )
    if failing:
        text = f"{len(failing)} of {len(rows)} kinds of tensor err more than allowed; {text}"
    return Verdict(
        "G4",
        not failing,
        row["used"],
        1.0,
        1.0 - row["used"],
        first_divergence=failing[0] if failing else None,
        detail=detail,
        explanation=text,
        sandboxed=sandboxed,
    )


def _refused(why: str, sandboxed: bool) -> Verdict:
    return Verdict("G4", False, explanation=why, sandboxed=sandboxed)
