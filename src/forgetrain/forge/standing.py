"""How candidates stand to the aligned engine, read from the ledger."""

from __future__ import annotations

import json

from forgetrain.judge.ledger import Ledger


def known_gains(ledger: Ledger, target: str) -> dict[str, float]:
    """Candidate → speed against the aligned engine, as it was told when the candidate was judged: the ratio of its
    last race that decided something (a G7 that failed, or a confirmation), times the gain of its opponent, the
    champion of that time. Candidates that lost at another gate have no figure and are left out.

    Args:
        target: the target's key in the ledger.
    """
    races = ledger.query(
        "SELECT j.number, j.candidate, v.detail FROM verdicts v JOIN judgings j ON j.id = v.judging "
        "WHERE j.target = ? AND v.gate = 'G7' AND (j.purpose = 'confirmation' OR (j.purpose = 'gates' AND NOT v.pass)) "
        "ORDER BY j.number",
        (target,),
    )
    elections = ledger.query(
        "SELECT j.number, e.ratio FROM elections e JOIN judgings j ON j.id = e.judging "
        "WHERE e.target = ? AND e.ratio IS NOT NULL",
        (target,),
    )
    gains: dict[str, float] = {}
    for race in races:
        ratio = (json.loads(race["detail"]) or {}).get("ratio")
        if ratio is None:
            continue
        for election in elections:
            # by the judgings' numbers, not by time: a clock may step back
            if election["number"] < race["number"]:
                ratio *= election["ratio"]
        gains[race["candidate"]] = ratio
    return gains
