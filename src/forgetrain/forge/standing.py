"""How candidates stand to the aligned engine, read from the ledger. Order is that of the judgings' numbers, because a
clock may step back. Times of another environment are not compared with those of this one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forgetrain.gates.verdict import Verdict
from forgetrain.judge.ledger import Ledger

_JUDGINGS = """
SELECT j.candidate, j.purpose, j.environment, j.passed, v.pass AS won, v.detail,
    e.number AS elected, d.election AS deposed
FROM judgings j
LEFT JOIN verdicts v ON v.judging = j.id AND v.gate = 'G7'
LEFT JOIN elections e ON e.judging = j.id
LEFT JOIN depositions d ON d.judging = j.id
WHERE j.target = ? AND j.purpose != 'hand' ORDER BY j.number
"""
_INTERVAL = ("ratio", "low", "high")


@dataclass(frozen=True)
class Timed:
    """A race: speed against the aligned engine, and the ends of its 95% interval. The uncertainty of the champion that
    it was raced against is not in it."""

    candidate: str
    purpose: str
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Standing:
    """Speeds against the aligned engine, as measured in one environment. gains: of candidates, each from the last race
    that decided something; those that lost at another gate have none. champion: None when its speed is not known.
    races: all, in their order."""

    gains: dict[str, float]
    champion: float | None
    races: list[Timed] = field(default_factory=list)


def standing(ledger: Ledger, target: str, environment: Mapping[str, Any]) -> Standing:
    """``target``: its key in the ledger. A race that was lost, or an election, gives its ratio times the gain of the
    champion of that time; a verification is raced against the aligned engine and gives the champion's gain itself."""
    gains: dict[str, float] = {}
    champions: list[float | None] = []  # the gain of each champion that stands, the present one last
    races: list[Timed] = []
    for row in ledger.query(_JUDGINGS, (target,)):
        race = _race(row) if json.loads(row["environment"]) == dict(environment) else None
        ratio = None if race is None else race["ratio"]
        against = 1.0 if row["purpose"] == "verification" else champions[-1] if champions else None
        if race is not None and against is not None:
            races.append(Timed(row["candidate"], row["purpose"], *(race[key] * against for key in _INTERVAL)))
        if row["purpose"] == "verification":
            if row["passed"] and ratio is not None and champions:
                champions[-1] = ratio
            if row["deposed"] is not None:
                champions.pop()
        elif row["purpose"] == "aligned":
            if row["elected"] is not None:
                champions.append(1.0)
        else:
            champion = champions[-1] if champions else None
            gain = None if ratio is None or champion is None else ratio * champion
            if gain is not None and (row["elected"] is not None or not row["won"]):
                gains[row["candidate"]] = gain
            if row["elected"] is not None:
                champions.append(gain)
    return Standing(gains, champions[-1] if champions else None, races)


def _race(judging: dict[str, Any]) -> dict[str, float] | None:
    """Of a judging whose G7 got as far as a ratio."""
    detail = json.loads(judging["detail"] or "null") or {}
    return detail if all(key in detail for key in _INTERVAL) else None


def lost_by(failed: Verdict) -> tuple[float | None, str]:
    """The ratio of a race that was lost, and that in words; None and nothing of another failure."""
    ratio = failed.detail.get("ratio") if failed.gate == "G7" else None
    return ratio, f", {ratio:.3f} times the champion" if ratio else ""


def moved(ledger: Ledger, target: str, candidate: str, environment: Mapping[str, Any]) -> str | None:
    """What of the environment has changed since the candidate was last raced, in words, or None."""
    rows = ledger.query(
        "SELECT j.environment FROM judgings j JOIN verdicts v ON v.judging = j.id AND v.gate = 'G7' "
        "WHERE j.target = ? AND j.candidate = ? AND j.purpose != 'hand' AND j.sandboxed IS NOT NULL "
        "ORDER BY j.number DESC LIMIT 1",
        (target, candidate),
    )
    there = json.loads(rows[0]["environment"]) if rows else {}
    changes = (f"{key} {there.get(key)!r}, here {value!r}" for key, value in environment.items())
    same = (there.get(key) == value for key, value in environment.items())
    return next((change for change, equal in zip(changes, same, strict=True) if not equal), None)


def attempts_since_verification(ledger: Ledger, target: str) -> int:
    """Attempts since the loop last judged its champion again to the end; all of them when it never did."""
    rows = ledger.query(
        "SELECT count(*) AS n FROM attempts WHERE target = ?1 AND number >= (SELECT coalesce(max(a.number), 0) "
        # sandboxed is unknown of a judging that a kill cut off
        "FROM attempts a JOIN judgings j ON j.id = 'verification-' || a.id "
        "WHERE a.target = ?1 AND j.sandboxed IS NOT NULL)",
        (target,),
    )
    return rows[0]["n"]


def passed_all_gates(ledger: Ledger, target: str, candidate: str) -> bool | None:
    """Whether the candidate passed when it was last judged by every gate, to the end; None when it never was."""
    rows = ledger.query(
        "SELECT passed FROM judgings WHERE target = ? AND candidate = ? AND purpose IN ('gates', 'verification') "
        "AND sandboxed IS NOT NULL ORDER BY number DESC LIMIT 1",
        (target, candidate),
    )
    return bool(rows[0]["passed"]) if rows else None
