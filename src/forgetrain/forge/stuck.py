"""What the loop does when nothing gets elected: a ladder, read from what became of the last attempts.

rung([{"outcome": "rejected", "reason": "rejected by G4"}] * 3).notes
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAME, OTHER_PARENT, CATALOGUE, STOP = 3, 5, 10, 20
#: A figure in a reason; the number in a gate's name is none.
_FIGURE = re.compile(r"\b\d[\w.+-]*")


@dataclass(frozen=True)
class Rung:
    """notes: for the brief. other_parent: begin from an earlier champion. catalogue: ask nobody else. stop: give up."""

    notes: tuple[str, ...] = ()
    other_parent: bool = False
    catalogue: bool = False
    stop: bool = False


def rung(attempts: Sequence[Mapping[str, Any]], call: int = 0) -> Rung:
    """``attempts``: all of them in order, as the ledger has them; only those since the last election count. ``call``:
    how many of them were made before this call. Earlier ones are told, but nobody is passed over or given up for them:
    they were another proposer's, or were made under another budget."""
    elected = max((place + 1 for place, row in enumerate(attempts) if row["outcome"] == "accepted"), default=0)
    since, here = attempts[elected:], attempts[max(elected, call) :]
    notes = []
    last = [_FIGURE.sub("", row["reason"]) for row in since[-SAME:]]
    if len(last) == SAME and last[0] and len(set(last)) == 1:
        notes.append(f"The last {SAME} attempts ended the same way: {since[-1]['reason']}. Avoid what led there.")
    other = len(since) >= OTHER_PARENT
    if other:
        notes.append(f"{len(since)} attempts in a row were not elected. Leave the op that they changed; try another.")
    # a proposer that could not be asked, or was cut off, has not run out of ideas
    tried = sum(row["outcome"] == "rejected" for row in here)
    # every second time another parent, so that the champion itself is not forgotten
    return Rung(tuple(notes), other and len(since) % 2 == 1, tried >= CATALOGUE, len(here) >= STOP)
