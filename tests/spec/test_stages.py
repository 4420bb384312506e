import tomllib

import pytest

from forgetrain.errors import UserError
from forgetrain.spec.estimate import memory
from forgetrain.spec.stages import resolve, stage_at, stages_of, steps_before, taken_before, tokens_before
from forgetrain.spec.target import StageSpec, parse_target
from forgetrain.spec.toml import to_toml
from tests.tiny import tiny_target

STAGES = [
    {"name": "stable", "steps": 4},
    {"name": "decay", "steps": 1, "weights": {"good": 2.0, "/data/x.y": 1.0}},
    {"name": "long", "steps": 1, "sequence_length": 64, "batch_size": 2},
]
SOURCES = [{"path": "/data/a", "name": "good"}, {"path": "/data/x.y"}]


def staged(*stages, **recipe):
    return tiny_target(data={"sources": SOURCES, "stages": list(stages)}, recipe=recipe)


def test_without_stages_there_is_one():
    (stage,) = stages_of(tiny_target())
    assert (stage.first, stage.last, stage.sequence_length, stage.batch_size) == (0, 6, 16, 4)


def test_stages_follow_one_another_with_the_recipes_values_filled_in():
    stages = stages_of(staged(*STAGES))
    assert [(s.name, s.first, s.last, s.sequence_length, s.batch_size) for s in stages] == [
        ("stable", 0, 4, 16, 4),
        ("decay", 4, 5, 16, 4),
        ("long", 5, 6, 64, 2),
    ]
    assert [stage_at(stages, step).name for step in (0, 3, 4, 5, 99)] == ["stable", "stable", "decay", "long", "long"]
    assert steps_before(stages, 5) == [4, 1, 0]
    assert [tokens_before(stages, step) for step in (0, 4, 5, 6, 7)] == [0, 256, 320, 448, 576]


def test_what_was_taken_does_not_depend_on_what_is_planned():
    now = stages_of(staged(*STAGES))
    other = stages_of(staged({"name": "renamed", "steps": 5}, {**STAGES[1], "steps": 1}))
    assert taken_before(now, 4) == taken_before(other, 4)
    assert taken_before(now, 5) != taken_before(other, 5)
    assert taken_before(stages_of(tiny_target()), 4) == taken_before(now, 4)


def test_memory_is_that_of_the_longest_stage():
    staged_memory, plain = memory(staged(*STAGES)), memory(tiny_target())
    assert staged_memory.activations == 4 * plain.activations  # 64 tokens a row instead of 16
    assert staged_memory.weights == plain.weights


def test_a_target_with_stages_survives_its_own_text():
    target = staged(*STAGES)
    for defaults in (True, False):
        assert parse_target(tomllib.loads(to_toml(target, defaults=defaults))) == target


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ([STAGES[0]], r"the steps of data.stages add up to 4, but recipe.steps = 6"),
        ([{**STAGES[0], "steps": 6, "weights": {"bad": 1.0}}], r"'stable' weighs 'bad', but the sources are 'good'"),
        ([{**STAGES[0], "steps": 3}] * 2, r"stages: two are called 'stable'"),
        ([{**STAGES[0], "steps": 6, "batch_size": 3}], r"batch_size = 3, no multiple of recipe.micro_batch_size = 2"),
        ([{**STAGES[0], "steps": 6, "sequence_length": 65}], r"65, which exceeds model.max_position_embeddings = 64"),
        ([{**STAGES[0], "steps": 6, "weights": {"good": 0.0}}], r"greater than 0"),
        ([{**STAGES[0], "steps": 6, "rope": 1}], r"unknown key"),
    ],
)
def test_stages_that_cannot_be_are_refused(stages, problem):
    with pytest.raises(UserError, match=problem):
        staged(*stages)


def test_stages_are_a_ramp_of_the_batch():
    ramp = [StageSpec(name=str(size), steps=10, batch_size=size) for size in (4, 8, 16)]
    stages = resolve(ramp, 30, sequence_length=16, batch_size=16)
    assert [stage_at(stages, step).batch_size for step in (0, 9, 10, 19, 20, 29)] == [4, 4, 8, 8, 16, 16]
    assert [tokens_before(stages, step) for step in (10, 20, 30)] == [640, 1920, 4480]
