"""The held-out loss of a run, over all sources and of each.

held_out = evaluate(engine, loader, world, limit=256, names=names_of(data, target))
held_out.loss, held_out.by_source["wiki"]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from forgetrain.data.folder import DataFolder
from forgetrain.data.loader import Loader
from forgetrain.engine.contract import Engine
from forgetrain.spec.target import Target
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


def names_of(data: DataFolder, target: Target) -> list[str]:
    """What the target calls the sources of its data; by their paths in a folder of an earlier version, which may have
    been built from others."""
    built, asked = [source.name for source in data.sources], target.data.sources
    return [source.label for source in asked] if built == [source.path for source in asked] else built


def evaluate(engine: Engine, loader: Loader, world: World, limit: int | None, names: Sequence[str]) -> HeldOut:
    """Every rank calls it; ``limit`` bounds the windows. A source without held-out tokens is left out, and those of one
    name are counted together."""
    whole = tokens = 0.0
    sums: dict[str, tuple[float, float]] = {}
    for number, name in enumerate(names):
        total = counted = 0.0
        for batch, weight in loader.held_out(limit, source=number):
            loss = float(engine.loss(batch))  # every rank calls it: an engine may speak with the others in it
            total, counted = total + (loss * weight if weight else 0.0), counted + weight
        total, counted = world.sum(total, counted)
        if counted:
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + counted
        whole, tokens = whole + total, tokens + counted
    return HeldOut(whole / tokens, {name: total / counted for name, (total, counted) in sums.items()})


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
