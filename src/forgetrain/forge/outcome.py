"""What the loop passes around and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forgetrain.judge.runner import Judgement


@dataclass(frozen=True)
class Champion:
    """gain: speed against the aligned engine, the product of the confirmed ratios."""

    digest: str
    source: str
    gain: float


@dataclass
class LoopOutcome:
    """ended: why, in words. verified: whether a champion passed when it was judged again at the end; None when the
    aligned engine was champion."""

    champion: str
    gain: float
    attempts: int
    elections: int
    ended: str
    folder: Path | None = None
    verified: bool | None = None
    verification: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "folder": None if self.folder is None else str(self.folder)}


@dataclass(frozen=True)
class Judged:
    """A judgement that came from a cluster. gain: of the champion that it was raced against; together: how many were
    judged at once, and share the time that it took."""

    judgement: Judgement
    gain: float
    together: int
