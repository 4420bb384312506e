"""What a hostile engine is: an honest written engine with a small change, and the gate that must catch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forgetrain.judge.runner import NUMERIC, name_of


@dataclass(frozen=True)
class Attack:
    """family, name: what it is called. what: what it does, in one line.
    gate: the first verdict that must fail; "A or B" where the seed decides. says: what its explanation must contain,
    for gates that fail in many ways.
    replace: (old, new) pieces of the honest source, each of which must be there.
    append: code after it, where the honest class is called Honest and its heir must be called Engine.
    dtype: of the target.
    races: whether it must beat the honest engine that it was made from."""

    family: str
    name: str
    what: str
    gate: str
    replace: tuple[tuple[str, str], ...] = ()
    append: str = ""
    says: str = ""
    dtype: str = "fp32"
    races: bool = False

    @property
    def gates(self) -> tuple[str, ...]:
        """Those that are run, as the judge calls them: ``gate`` may be a part, as G7.replay is."""
        return tuple(dict.fromkeys(name_of(gate, NUMERIC) for gate in self.gate.split(" or ")))

    @property
    def cheap(self) -> bool:
        """Whether the first gate catches it without a wait."""
        return self.gate == "contract" and "time allowed" not in self.says

    def source(self, honest: str) -> str:
        """Raises ValueError when the honest source has not what is to be replaced."""
        text = honest
        for old, new in self.replace:
            if old not in text:
                raise ValueError(f"{self.name}: the written engine has no {old!r}")
            text = text.replace(old, new)
        return f"{text}\n\nHonest = Engine\n{self.append}" if self.append else text


def maker(family: str) -> Callable[..., Attack]:
    """Makes attacks of one family from code to append."""

    def attack(name: str, what: str, gate: str, append: str, **how: Any) -> Attack:
        return Attack(family, name, what, gate, append=append, **how)

    return attack
