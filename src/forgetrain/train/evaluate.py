"""The held-out loss of a run, over all sources and of each.

held_out = evaluate(engine, loader, world, limit=256)
held_out.loss, held_out.by_source["wiki"]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from forgetrain.data.loader import Loader
from forgetrain.engine.contract import Engine
from forgetrain.train.metrics import read_journal
from forgetrain.train.world import World

_EACH = "held_out_loss/"


class HeldOut(NamedTuple):
    """Mean losses a token, in nats: of all held-out tokens, and by the sources' names."""

    loss: float
    by_source: dict[str, float]

    def line(self) -> dict[str, float]:
        """For the journal; one source alone is not named."""
        each = self.by_source if len(self.by_source) > 1 else {}
        return {"held_out_loss": self.loss} | {_EACH + name: loss for name, loss in each.items()}


def evaluate(engine: Engine, loader: Loader, world: World, limit: int | None) -> HeldOut:
    """Every rank calls it; ``limit`` bounds the windows. A source without held-out tokens is left out."""
    whole = tokens = 0.0
    by_source = {}
    for number, source in enumerate(loader.data.sources):
        total = counted = 0.0
        for batch, weight in loader.held_out(limit, source=number):
            loss = float(engine.loss(batch))  # every rank calls it: an engine may speak with the others in it
            total, counted = total + (loss * weight if weight else 0.0), counted + weight
        total, counted = world.sum(total, counted)
        if counted:
            by_source[source.name] = total / counted
        whole, tokens = whole + total, tokens + counted
    return HeldOut(whole / tokens, by_source)


def past_evaluations(journal: Path, only: str) -> dict[int, HeldOut]:
    """Step → what a ``metrics.jsonl`` holds of it. ``only``: the name of the source where there is one alone."""
    found = {}
    for line in read_journal(journal):
        if line.get("held_out_loss") is not None:
            found[line["step"]] = HeldOut(line["held_out_loss"], _by_source(line, only))
    return found


def _by_source(line: dict[str, Any], only: str) -> dict[str, float]:
    each = {key.removeprefix(_EACH): loss for key, loss in line.items() if key.startswith(_EACH)}
    return each or {only: line["held_out_loss"]}
