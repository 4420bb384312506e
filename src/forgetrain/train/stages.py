"""What the stages of a run ask of its loop: engines that take every length, checkpoints of the same past, and counts.

    require_same_past(found, stages, target)            # when resuming
    require_every_length(engine, stages, target, ...)   # before the first step
    tokens_by_length(stages, 900, left_out=[])          # {4096: 3_000_000, 32768: 800_000}
    comparable(stages, 900)                             # the stage whose losses a spike is one among

Steps here are numbers of global batches, which are ahead of the run's steps once batches were left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from forgetrain.engine.contract import Batch, Engine, make_batch
from forgetrain.errors import UserError
from forgetrain.spec.stages import Stage, resolve, stage_at, steps_before, taken_before
from forgetrain.spec.target import StageSpec, Target
from forgetrain.train.checkpoint import Checkpoint


def require_same_past(found: Checkpoint, stages: Sequence[Stage], target: Target) -> None:
    """Raises UserError when the batches of a checkpoint's steps are not those that ``stages`` have there."""
    number = found.step + found.manifest.get("spikes", {}).get("offset", 0)
    before = found.manifest["target"]
    specs = [StageSpec.model_validate(spec) for spec in before["data"].get("stages", [])]
    theirs = resolve(specs, before["recipe"]["steps"], target.recipe.sequence_length, target.recipe.batch_size)
    if taken_before(theirs, number) != taken_before(stages, number):
        raise UserError(
            f"is a checkpoint of another target: data.stages differ within its first {number} batches",
            file=found.path,
            key="data.stages",
            remedy="change stages that are still to come only, or start again with --restart",
        )


def require_every_length(engine: Engine, stages: Sequence[Stage], target: Target, *, device: str, name: str) -> None:
    """Asks the engine for the loss of a micro-batch of every length that only later stages have.

    Raises:
        UserError: it fails at one, in one line; before the first step, not after the first stage.
    """
    for stage in stages[1:]:
        if stage.sequence_length == stages[0].sequence_length:
            continue
        try:
            finite = bool(engine.loss(_zeros(target.recipe.micro_batch_size, stage.sequence_length, device)).isfinite())
        except Exception as error:  # an engine is anyone's code, and may fail in any way
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise _refused(stage, name, why) from error
        if not finite:
            raise _refused(stage, name, "its loss is not finite")


def _zeros(rows: int, length: int, device: str) -> Batch:
    tokens = torch.zeros(rows, length, dtype=torch.int64, device=device)
    return make_batch(tokens, tokens)


def _refused(stage: Stage, name: str, why: str) -> UserError:
    return UserError(
        f"does not take sequences of {stage.sequence_length} tokens, which stage {stage.name!r} has: {why}",
        file=name,
        key="data.stages",
        remedy="shorten that stage's sequence_length, or use another engine",
    )


def tokens_by_length(stages: Sequence[Stage], number: int, left_out: Iterable[Sequence[int]]) -> dict[int, int]:
    """Sequence length → tokens of the first ``number`` batches, those of the ranges ``left_out`` not counted."""
    counts = dict.fromkeys((stage.sequence_length for stage in stages), 0)

    def add(before: int, sign: int) -> None:
        for steps, stage in zip(steps_before(stages, before), stages, strict=True):
            counts[stage.sequence_length] += sign * steps * stage.tokens_per_step

    add(number, 1)
    for first, end in left_out:
        add(first, 1)
        add(end, -1)
    return {length: tokens for length, tokens in counts.items() if tokens}


def comparable(stages: Sequence[Stage], number: int) -> int:
    """Which stage the losses around batch ``number`` may be compared in: the first of those in a row up to it that have
    its mixture and length. A larger batch alone makes a loss no harder."""
    place = stages.index(stage_at(stages, number))
    while place and _text(stages[place - 1]) == _text(stages[place]):
        place -= 1
    return place


def _text(stage: Stage) -> tuple[int, dict[str, float]]:
    return stage.sequence_length, dict(stage.weights)


def mean_length(tokens: dict[int, int]) -> int:
    """The length at which a token costs what those of ``tokens_by_length`` cost on average: attention is linear in it.
    0 when there are none."""
    return round(sum(length * count for length, count in tokens.items()) / max(sum(tokens.values()), 1))
