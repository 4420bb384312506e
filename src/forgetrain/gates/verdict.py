"""What every gate returns: pass or fail, with the number that decided and how close it was."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from forgetrain.errors import UserError


@dataclass(frozen=True)
class Verdict:
    """One gate's judgement of one candidate.

    statistic: the number that was compared, threshold: with what, margin: how much of the threshold was left, positive
    when passed (None where a gate compares bits). first_divergence: the first tap that differs, or None.
    detail: plain values for the ledger. explanation: plain words for a person. sandboxed: whether the candidate ran in
    the sandbox.
    """

    gate: str
    passed: bool
    statistic: float | None = None
    threshold: float | None = None
    margin: float | None = None
    first_divergence: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    explanation: str = ""
    sandboxed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for ``verdicts.json`` and the ledger, where ``passed`` is called ``pass``."""
        values = asdict(self)
        return {"gate": values.pop("gate"), "pass": values.pop("passed"), **values}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Verdict:
        """What ``as_dict`` gave, or a row of the ledger; keys that no verdict has are left out."""
        values = {field.name: plain[field.name] for field in fields(cls) if field.name in plain}
        return cls(**{**values, "passed": bool(plain["pass"]), "sandboxed": bool(plain.get("sandboxed"))})


def share_of(value: float, allowed: float) -> float:
    """How much of an allowance a value uses; infinite where either is not finite."""
    if not (math.isfinite(value) and math.isfinite(allowed)):
        return math.inf
    if allowed == 0.0:
        return 0.0 if value == 0.0 else math.inf
    return value / allowed


def require_verdicts(found: object, file: Path) -> None:
    """Raises UserError unless it is a list of verdicts as plain values, which ``file`` should have."""
    good = isinstance(found, list) and all(isinstance(one, dict) and {"gate", "pass"} <= one.keys() for one in found)
    if not good:
        raise UserError("are no verdicts", file=file, key="verdicts", remedy="have the engine judged again")
