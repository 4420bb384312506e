"""Whether every weight moves as it does in the engine that runs beside: what a replay of single blocks cannot tell.

A layer whose weights are all zero has no gradient, computes nothing, and stays so: from such a state the reference does
the same. But it stands still, where the same tensor of another engine moves: Adam's steps are about as long for every
tensor, whatever its gradients are. And who puts weights elsewhere between two blocks is seen to jump.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from forgetrain.gates.verdict import Verdict

#: How many times as far as the other engine's a tensor may move, or as little: honest ones agree to a few per cent.
FACTOR = 10.0
#: Numbers of a tensor that may stand still beyond the other engine's, as a share of all, and beside it.
STILL, FEW = 0.01, 2
#: Tensors that move less than this share of the middle one have a gradient of rounding errors alone.
_NOISE = 1e-2


class Motion(NamedTuple):
    """What some steps did to a tensor: how many of its numbers stand still, of how many, and the root of the mean
    square of all that was added."""

    still: int
    numbers: int
    rms: float


class Answer(NamedTuple):
    """What a step returned."""

    loss: float
    norm: float
    applied: bool


def motion_of(before: Mapping[str, Tensor], after: Mapping[str, Tensor], device: str = "cpu") -> dict[str, Motion]:
    """``device``: where it is computed."""
    found = {}
    for name, old in before.items():
        added = after[name].to(device) - old.to(device)
        rms = math.sqrt(float(added.double().square().mean()))
        found[name] = Motion(int((added == 0).sum()), added.numel(), rms)
    return found


def motion(
    candidate: Sequence[Mapping[str, Motion]],
    other: Sequence[Mapping[str, Motion]],
    answers: Sequence[Answer],
    other_answers: Sequence[Answer],
    *,
    sandboxed: bool = False,
) -> Verdict:
    """Under G7.replay's name. Both met the same batches from the same weights; motions block by block, the warm-up
    first, answers step by step."""
    where = next(
        (
            f"step {step} of the timed run was not applied, or its loss {mine.loss} or norm {mine.norm} is not a number"
            for step, (mine, theirs) in enumerate(zip(answers, other_answers, strict=True))
            if not _trained(mine) and _trained(theirs)
        ),
        None,
    )
    for block, (mine, theirs) in enumerate(zip(candidate, other, strict=True)):
        where = where or _apart(mine, theirs, f"block {block}" if block else "the warm-up")
    text = where or "every weight moves in every block as the other engine's does"
    used = 0.0 if where is None else math.inf
    return Verdict("G7.replay", where is None, used, 1.0, 1.0 - used, explanation=text, sandboxed=sandboxed)


def _trained(answer: Answer) -> bool:
    return answer.applied and math.isfinite(answer.loss) and math.isfinite(answer.norm)


def _apart(mine: Mapping[str, Motion], theirs: Mapping[str, Motion], when: str) -> str | None:
    middle = statistics.median(due.rms for due in theirs.values())
    for name, due in theirs.items():
        found = mine[name]
        if found.still > due.still + STILL * due.numbers + FEW:
            return (
                f"{name} stands still in {when} of the timed run in {found.still} of {found.numbers} numbers; "
                f"the other engine's in {due.still}"
            )
        if due.rms > _NOISE * middle and not due.rms / FACTOR <= found.rms <= due.rms * FACTOR:
            return f"{name} moves by {found.rms:.2g} in {when} of the timed run; the other engine's by {due.rms:.2g}"
    return None
