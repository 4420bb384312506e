"""The room's doors for who is already at work: what a proposer may read, and where it leaves a candidate.

room = Room(loop)
room.brief()                       # BRIEF.md
room.submit(source, "fuses the norm into the product before it")
room.verdicts("5f1c")              # of hidden gates pass or fail alone
"""

from __future__ import annotations

import hashlib
from typing import Any

from forgetrain.errors import UserError
from forgetrain.forge.optimise import OPEN_GATES, Loop
from forgetrain.forge.proposers.base import Proposal


class Room:
    """``name``: who writes, for the ledger."""

    def __init__(self, loop: Loop, name: str = "mcp"):
        self._loop, self._name = loop, name

    def brief(self) -> str:
        """The goal, the contract, what was tried, what failed last, and what is left of the budget, as Markdown."""
        return self._loop.brief().markdown()

    def champion(self) -> str:
        """The champion's source: what a candidate must beat, and a good place to begin."""
        with self._loop.claimed():
            return self._loop.champion().source

    def submit(self, source: str, message: str) -> dict[str, Any]:
        """Judges a candidate through every gate and against the clock; it is elected if it is right and faster."""
        outcome = self._loop.submit(Proposal(source, " ".join(message.split())[:500]), self._name)
        candidate = hashlib.sha256(source.encode()).hexdigest()
        return {"outcome": outcome.ended, "candidate": candidate, **self.verdicts(candidate)}

    def verdicts(self, candidate: str) -> dict[str, Any]:
        """Every verdict on a candidate, by its hash or how that begins."""
        ledger = self._loop.ledger
        try:
            digest = ledger.candidate(candidate, self._loop.key)["hash"]
        except UserError as error:
            return {"error": error.problem}
        return {"verdicts": [_told(verdict) for verdict in ledger.verdicts(digest, self._loop.key)]}

    def profile(self) -> dict[str, Any]:
        """Where the champion's step spends its time: seconds of each op beside the least that the hardware allows, the
        one that loses the most first, and the costliest places in its file."""
        loop = self._loop
        with loop.claimed():
            profile = loop.profile(loop.champion().digest)
        if profile is None:
            return {"error": "this loop has no profiler"}
        return {
            "step_seconds": profile.step_seconds,
            "ops": [{**vars(gap), "share": gap.seconds / profile.step_seconds} for gap in profile.gaps(loop.target)],
            "places": [
                {"functions": functions, "operator": operator, "share": share, "calls": calls}
                for functions, operator, share, calls in profile.rows
            ],
        }

    def leaderboard(self) -> list[dict[str, Any]]:
        """The target's candidates in the order in which they came, with what became of each."""
        kept = ("number", "hash", "parent", "proposer", "message", "passed", "failed", "elected", "elected_ratio")
        return [{key: row[key] for key in kept} for row in self._loop.ledger.candidates(self._loop.key)]


def _told(verdict: dict[str, Any]) -> dict[str, Any]:
    seen = verdict["gate"] in OPEN_GATES
    return {
        "gate": verdict["gate"],
        "pass": bool(verdict["pass"]),
        "purpose": verdict["purpose"],
        **({"explanation": verdict["explanation"]} if seen else {}),
    }
