"""The aligned engine in the ledger: champion where no candidate is, with its verdicts G1 to G3.

baseline = adopt_aligned(ledger, key, runs / target.name, environment)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forgetrain.forge.refs import keep_commit
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.ledger import Ledger
from forgetrain.train.verified import find_verdicts


def adopt_aligned(ledger: Ledger, target: str, run: Path, environment: Mapping[str, Any]) -> str:
    """Enters the aligned engine, and elects it where nobody is champion or an aligned engine of before is, for every
    new golden record makes another file. Returns its hash. ``target``: its key; ``run``: its folder."""
    file = run / "engine" / "engine.py"
    source = file.read_bytes()
    digest = ledger.add_candidate(target, source, proposer="align", message="equals the reference")
    champion = ledger.champion(target)
    if champion is None or (champion["candidate"] != digest and _is_aligned(ledger, champion)):
        judging = ledger.begin_judging(target, digest, environment=environment, purpose="aligned")
        recorded = find_verdicts(file, []) or []
        ledger.add_verdicts(judging, [Verdict.from_dict(plain) for plain in recorded])
        ledger.end_judging(judging, passed=True, sandboxed=False)
        ledger.elect(judging)
        keep_commit(run, run.name, digest, source.decode(), "aligned engine")
    return digest


def _is_aligned(ledger: Ledger, election: Mapping[str, Any]) -> bool:
    rows = ledger.query("SELECT purpose FROM judgings WHERE id = ?", (election["judging"],))
    return rows[0]["purpose"] == "aligned"
