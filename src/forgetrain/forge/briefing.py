"""What a proposer is told, put together from the ledger.

brief = write_brief(target, champion, plan, budget, attempts, notes=(), profile=None, first_failure=None)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forgetrain.engine.plan import Plan
from forgetrain.errors import UserError
from forgetrain.forge.outcome import Champion
from forgetrain.forge.profile import Profile
from forgetrain.forge.proposers.base import Attempt, Brief, Budget
from forgetrain.judge.ledger import Ledger
from forgetrain.spec.target import Target

#: Attempts that a brief tells of, and ops.
TOLD, PROFILED = 8, 5


def write_brief(
    target: Target,
    parent: Champion,
    plan: Plan | None,
    budget: Budget,
    history: Sequence[dict[str, Any]],
    notes: tuple[str, ...],
    profile: Profile | None,
    first_failure: str | None,
) -> Brief:
    """``parent``: the engine to begin from, and its plan where it has one. ``history``: rows of the ledger's attempts,
    the last of which are told. ``profile``: of the parent."""
    told = [
        Attempt(row["number"], row["proposer"], row["message"] or "no candidate", row["reason"] or row["outcome"])
        for row in history[-TOLD:]
    ]
    return Brief(
        target,
        parent.source,
        plan,
        budget,
        profile=() if profile is None else profile.top(PROFILED),
        gaps=() if profile is None else tuple(gap.op for gap in profile.gaps(target)),
        first_failure=first_failure,
        attempts=tuple(told),
        notes=notes,
    )


def plan_behind(ledger: Ledger, digest: str, key: str) -> Plan | None:
    """The plan that a candidate was written from, where it was, and where every choice in it still exists."""
    files = ledger.candidate(digest, key)["files"]
    if "plan.toml" not in files:
        return None
    path = ledger.files.path(files["plan.toml"])
    try:
        return Plan.read(path)
    except UserError:  # an older version's
        return None
