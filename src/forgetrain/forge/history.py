"""What the ledger knows of a target's attempts, as the loop asks it; what it knows of their speed is in standing.py.
``target`` is its key in the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from forgetrain.forge.proposers.base import Budget
from forgetrain.judge.ledger import Ledger
from forgetrain.spec.target import Search

_DECIDED = """
SELECT DISTINCT a.candidate, j.passed, j.environment, v.pass AS won,
    EXISTS (SELECT 1 FROM elections WHERE target = a.target AND candidate = a.candidate) AS elected
FROM attempts a
LEFT JOIN judgings j ON j.number = (SELECT max(number) FROM judgings WHERE target = a.target
    AND candidate = a.candidate AND purpose != 'hand' AND sandboxed IS NOT NULL) -- unknown of one that was cut off
LEFT JOIN verdicts v ON v.judging = j.id AND v.gate = 'G7'
WHERE a.target = ? AND a.outcome IN ('accepted', 'rejected')
"""


def outcomes(ledger: Ledger, target: str) -> list[dict[str, Any]]:
    """The attempts in order, with what became of them."""
    return ledger.query(
        "SELECT a.*, c.message FROM attempts a LEFT JOIN candidates c ON c.hash = a.candidate AND c.target = a.target "
        "WHERE a.target = ? AND a.proposer != 'align' ORDER BY a.number",
        (target,),
    )


def judged(ledger: Ledger, target: str, environment: Mapping[str, Any]) -> set[str]:
    """Candidates about whom everything is said. One whose judging a kill cut off may come again, and so may one that
    passed and was not elected, for it was unsandboxed, and one that lost the race in another environment."""
    decided = set()
    for row in ledger.query(_DECIDED, (target,)):
        elsewhere = row["environment"] is not None and json.loads(row["environment"]) != dict(environment)
        again = (row["passed"] and not row["elected"]) or (row["won"] == 0 and elsewhere)
        if not again:
            decided.add(row["candidate"])
    return decided


def elections(ledger: Ledger, target: str) -> int:
    """How many candidates were elected."""
    rows = ledger.query(
        "SELECT count(*) AS n FROM elections e JOIN judgings j ON j.id = e.judging "
        "WHERE e.target = ? AND j.purpose != 'aligned'",
        (target,),
    )
    return rows[0]["n"]


def champion_before(ledger: Ledger, target: str, champion: str) -> str | None:
    """Whose election stands beside this champion's, the latest."""
    rows = ledger.query(
        "SELECT candidate FROM elections WHERE target = ? AND candidate != ? "
        "AND number NOT IN (SELECT election FROM depositions) ORDER BY number DESC LIMIT 1",
        (target, champion),
    )
    return rows[0]["candidate"] if rows else None


def budget_left(ledger: Ledger, target: str, limits: Search) -> Budget:
    spent = ledger.spent(target)
    return Budget(
        limits.minutes - spent.seconds / 60,
        limits.attempts - spent.attempts,
        max(0.0, limits.dollars - spent.dollars),
        max(0, limits.tokens - spent.tokens),
    )
