"""The stages of a run: which shape and which mixture each step has. A pure function of the target.

stages = stages_of(target)                  # one, when the target has no [[data.stages]]
stage_at(stages, step=900).sequence_length
tokens_before(stages, step=900)             # what a run has trained on after 900 steps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forgetrain.spec.target import StageSpec, Target


@dataclass(frozen=True)
class Stage:
    """Steps ``first`` to ``last`` - 1 of a run; the last stage also holds every step after it.

    batch_size: sequences a step, over all ranks. weights: by the sources' names; empty means the sources' own.
    """

    name: str
    first: int
    last: int
    sequence_length: int
    batch_size: int
    weights: Mapping[str, float]

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


def stages_of(target: Target) -> list[Stage]:
    """The stages in their order, the recipe's values filled in."""
    recipe = target.recipe
    return resolve(target.data.stages, recipe.steps, recipe.sequence_length, recipe.batch_size)


def resolve(specs: Sequence[StageSpec], steps: int, sequence_length: int, batch_size: int) -> list[Stage]:
    """``specs`` one after another; without any, one stage of ``steps`` steps."""
    if not specs:
        return [Stage("", 0, steps, sequence_length, batch_size, {})]
    stages, first = [], 0
    for spec in specs:
        shape = spec.sequence_length or sequence_length, spec.batch_size or batch_size
        stages.append(Stage(spec.name, first, first + spec.steps, *shape, spec.weights))
        first += spec.steps
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of step ``step``, counted from 0."""
    return next((stage for stage in stages if step < stage.last), stages[-1])


def steps_before(stages: Sequence[Stage], step: int) -> list[int]:
    """How many steps of each stage come before step ``step``."""
    ends = [stage.last for stage in stages[:-1]] + [step]
    return [max(0, min(step, end) - stage.first) for stage, end in zip(stages, ends, strict=True)]


def tokens_before(stages: Sequence[Stage], step: int) -> int:
    """Tokens of all steps before step ``step``, over all ranks."""
    return sum(n * stage.tokens_per_step for n, stage in zip(steps_before(stages, step), stages, strict=True))


def taken_before(stages: Sequence[Stage], step: int) -> list[tuple[int, int, int, dict[str, float]]]:
    """What the steps before ``step`` were made of: each stage's steps, shape and weights. Two targets for which this is
    equal agree on every batch until then, whatever they plan for later."""
    taken = zip(steps_before(stages, step), stages, strict=True)
    return [(n, stage.sequence_length, stage.batch_size, dict(stage.weights)) for n, stage in taken if n]
