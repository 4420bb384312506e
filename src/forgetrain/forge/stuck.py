"""What the loop does when nothing gets elected: a ladder, read from the outcomes of the last attempts.

rung(["elected", "rejected by G4", "rejected by G4", "rejected by G4"]).notes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SAME, OTHER_PARENT, CATALOGUE, STOP = 3, 5, 10, 20
ELECTED = "elected"


@dataclass(frozen=True)
class Rung:
    """notes: for the brief. other_parent: begin from an earlier champion. catalogue: ask nobody else. stop: give up."""

    notes: tuple[str, ...] = ()
    other_parent: bool = False
    catalogue: bool = False
    stop: bool = False


def rung(outcomes: Sequence[str]) -> Rung:
    """``outcomes``: of all attempts in order; only those since the last election count."""
    since = list(outcomes)
    while ELECTED in since:
        since = since[since.index(ELECTED) + 1 :]
    notes = []
    if len(since) >= SAME and len(set(since[-SAME:])) == 1:
        notes.append(f"The last {SAME} attempts ended the same way: {since[-1]}. Avoid what led there.")
    other = len(since) >= OTHER_PARENT
    if other:
        notes.append(f"{len(since)} attempts in a row were not elected. Leave the op that they changed; try another.")
    # every second time, so that the champion itself is not forgotten
    return Rung(tuple(notes), other and len(since) % 2 == 1, len(since) >= CATALOGUE, len(since) >= STOP)
