"""Trajectories made up for tests of gates."""

from __future__ import annotations

from forgetrain.gates.g2 import StepRecord


def trajectory(steps: int, **last: object) -> list[StepRecord]:
    """``steps`` records, of which the last has other values where ``last`` says so."""
    points = [{"loss": 5.0 - s, "grad_norm": 1.0, "applied": True, "weight_hash": f"hash {s}"} for s in range(steps)]
    points[-1] |= last
    return [StepRecord(**point) for point in points]
