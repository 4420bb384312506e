"""G3: bits hold across ranks and across a restart.

Two ranks: the candidate at world size 2 equals the reference at world size 2, same reduction, step by step. Resume: a
fresh process that restores a state and goes on equals the run that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from forgetrain.gates.g2 import Parting, StepRecord, first_parting
from forgetrain.gates.verdict import Verdict


def g3(
    reference_ranks: Sequence[StepRecord],
    candidate_ranks: Sequence[StepRecord],
    uninterrupted: Sequence[StepRecord],
    resumed: Sequence[StepRecord],
    *,
    ranks: int = 2,
    sandboxed: bool = False,
) -> Verdict:
    """``reference_ranks`` and ``candidate_ranks`` are trajectories at ``ranks`` processes; ``uninterrupted`` and
    ``resumed`` the candidate's own steps after the point at which the second was restored."""
    parts: dict[str, tuple[Sequence[StepRecord], Sequence[StepRecord]]] = {
        f"world size {ranks}": (reference_ranks, candidate_ranks),
        "resume": (uninterrupted, resumed),
    }
    steps = sum(len(due) for due, _ in parts.values())
    for name, (due, found) in parts.items():
        if not due:
            return Verdict("G3", False, 0, 1, explanation=f"{name}: nothing was run", sandboxed=sandboxed)
        parting = first_parting(due, found)
        if parting is not None:
            return _failed(name, parting, steps, sandboxed)
    return Verdict(
        "G3",
        True,
        steps,
        steps,
        0,
        explanation=f"world size {ranks} equals the reference at world size {ranks} over {len(reference_ranks)} steps, "
        f"and a fresh process that restores the state goes on bit for bit over {len(resumed)} steps",
        sandboxed=sandboxed,
    )


def _failed(name: str, parting: Parting, steps: int, sandboxed: bool) -> Verdict:
    other = "the uninterrupted run has" if name == "resume" else "the reference has"
    return Verdict(
        "G3",
        False,
        parting.step,
        steps,
        parting.step - steps,
        first_divergence=f"{name}, step {parting.step}: {parting.quantity}",
        detail={"part": name, "parting": asdict(parting)},
        explanation=f"{name}: step {parting.step}: {parting.quantity} is {parting.actual!r}, {other} "
        f"{parting.expected!r}",
        sandboxed=sandboxed,
    )
