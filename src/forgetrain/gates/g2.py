"""G2: a trajectory of N steps is bit for bit the reference's, on batches drawn after the candidate was frozen.

Evidence is one ``StepRecord`` a step. Weights are compared through their SHA-256, so that a step's record is small and
the two runs need not be in memory together. ``trajectory`` is how every run that is compared is driven.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forgetrain.gates.verdict import Verdict


@dataclass(frozen=True)
class StepRecord:
    """loss and grad_norm: fp32 values, exact as Python floats. applied: whether the update was made.
    weight_hash: of the master weights after the step (engine/contract.py)."""

    loss: float
    grad_norm: float
    applied: bool
    weight_hash: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Parting:
    """The first step, from 0, and the quantity at which two trajectories part."""

    step: int
    quantity: str
    expected: Any
    actual: Any

    def __str__(self) -> str:
        return f"step {self.step}: {self.quantity} is {self.actual!r}, the reference has {self.expected!r}"


def first_parting(expected: Sequence[StepRecord], actual: Sequence[StepRecord]) -> Parting | None:
    """None when both have the same length and every quantity is equal; a value that is not finite equals nothing."""
    for step, (due, found) in enumerate(zip(expected, actual, strict=False)):
        for quantity, value in due.as_dict().items():
            here = getattr(found, quantity)
            if here != value or (isinstance(here, float) and not math.isfinite(here)):
                return Parting(step, quantity, value, here)
    if len(expected) != len(actual):
        return Parting(min(len(expected), len(actual)), "number of steps", len(expected), len(actual))
    return None


def g2(
    expected: Sequence[StepRecord],
    actual: Sequence[StepRecord],
    *,
    steps: int,
    seed: int | None = None,
    sandboxed: bool = False,
) -> Verdict:
    """Passed when ``steps`` steps agree in loss, gradient norm and weight hash.

    ``seed``: what the batches were made from, kept so that the run can be repeated. ``statistic``: equal steps.
    """
    parting = first_parting(expected, actual)
    equal = len(actual) if parting is None else parting.step
    passed = parting is None and equal >= steps
    if passed:
        text = f"{equal} steps on unseen batches agree bit for bit in loss, gradient norm and weights"
    elif parting is None:
        text = f"only {equal} of {steps} steps were run"
    else:
        text = f"the trajectories part at {parting}"
    return Verdict(
        "G2",
        passed,
        equal,
        steps,
        equal - steps,
        first_divergence=None if parting is None else f"step {parting.step}: {parting.quantity}",
        detail={"seed": seed, "parting": None if parting is None else asdict(parting)},
        explanation=text,
        sandboxed=sandboxed,
    )
