"""A brief for tests."""

from __future__ import annotations

from forgetrain.engine.plan import Plan
from forgetrain.forge.proposers.base import Attempt, Brief, Budget
from tests.tiny import tiny_target


def brief(champion: str = "x = 1\n", *, minutes: float = 10, tokens: int = 100_000, dollars: float = 0.0) -> Brief:
    return Brief(
        target=tiny_target(),
        champion=champion,
        plan=Plan.textbook(),
        budget=Budget(minutes=minutes, attempts=5, dollars=dollars, tokens=tokens),
        profile=(("attention", 0.41), ("lm_head", 0.2)),
        first_failure="g4: the RMS error of lm_head is 3.1 times the reference's",
        attempts=(Attempt(1, "catalogue", "production schedule", "elected", 1.8),),
        dead_ends=("8-bit moments: rejected by g5",),
    )
