"""G9: the shipped command trains with this engine as the judge does, and a kill loses nothing.

``forgetrain train`` runs under torchrun with the candidate, once through and once killed and resumed. The judge drives
the same engine through the same batches itself and holds the state that comes out. A deterministic engine must end
with the same weights in all three; one that says it is not is held to its losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forgetrain.gates.verdict import Verdict


@dataclass(frozen=True)
class TrainingRun:
    """What a run of the command left: losses by step from 1; the SHA-256 of the last weights' canonical fp32 masters,
    which the command reads through its checkpoint where ranks keep parts, None when it left none; problem: why it did
    not end as it should, in words."""

    losses: Mapping[int, float]
    digest: str | None
    problem: str | None = None


def g9(
    due: Sequence[float],
    digest: str,
    runs: Mapping[str, TrainingRun],
    *,
    layout: str,
    tolerance: float | None = None,
    sandboxed: bool = False,
) -> Verdict:
    """``due``: the losses that the judge saw, of steps 1 on; ``digest``: of the weights after the last. ``runs``: by
    what was done to them. ``layout``: of their ranks, in words. ``tolerance``: of a loss, relative, for an engine that
    is not deterministic; None for bits.

    ``statistic`` is the largest relative difference of a loss, ``threshold`` the tolerance or 0.
    """
    worst = 0.0
    for name, run in runs.items():
        if run.problem is not None:
            return _failed(f"{name}: {run.problem}", sandboxed)
        if sorted(run.losses) != list(range(1, len(due) + 1)):
            return _failed(f"{name}: {len(run.losses)} steps are in its metrics, {len(due)} are due", sandboxed)
        for step, loss in enumerate(due, 1):
            apart = abs(run.losses[step] - loss) / max(abs(loss), 1e-12)
            worst = max(worst, apart)
            if not apart <= (tolerance or 0.0):
                text = f"{name}: the loss of step {step} is {run.losses[step]!r}, the judge's own run has {loss!r}"
                return _failed(text, sandboxed, apart, tolerance)
        if tolerance is None and run.digest != digest:
            return _failed(f"{name}: the last weights are others than in the judge's own run", sandboxed)
    held = "bit for bit" if tolerance is None else f"within {tolerance:g} of each loss"
    return Verdict(
        "G9",
        True,
        worst,
        tolerance or 0.0,
        (tolerance or 0.0) - worst,
        explanation=f"forgetrain train on {layout} ends as the judge's own run does after "
        f"{len(due)} steps, {held}: {', '.join(runs)}",
        sandboxed=sandboxed,
    )


def _failed(text: str, sandboxed: bool, statistic: float | None = None, threshold: float | None = None) -> Verdict:
    margin = None if statistic is None else (threshold or 0.0) - statistic
    return Verdict("G9", False, statistic, threshold, margin, explanation=text, sandboxed=sandboxed)
