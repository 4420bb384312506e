"""G7.replay's second half: weights that stand still or jump where the other engine's move."""

from __future__ import annotations

import math

import pytest
import torch

from forgetrain.gates.motion import Answer, motion, motion_of

GENERATOR = torch.Generator().manual_seed(0)
BEFORE = {f"layer.{number}": torch.randn(20, 10, generator=GENERATOR) for number in range(3)}
MOVED = {name: old + 1e-3 * torch.randn(20, 10, generator=GENERATOR) for name, old in BEFORE.items()}
ANSWERS = [Answer(2.0, 1.0, True)] * 4


def verdict(**changed):
    mine = motion_of(BEFORE, {**MOVED, **changed})
    other = motion_of(BEFORE, MOVED)
    return motion([mine, other], [other, other], ANSWERS, ANSWERS)


def test_what_moves_alike_passes():
    assert verdict().passed
    assert verdict(**{"layer.1": BEFORE["layer.1"] + 2e-3 * torch.randn(20, 10, generator=GENERATOR)}).passed


def test_a_tensor_that_stands_still_is_found():
    found = verdict(**{"layer.1": BEFORE["layer.1"]})
    assert not found.passed
    assert "layer.1 stands still in the warm-up of the timed run in 200 of 200 numbers; the other engine's in 0" in (
        found.explanation
    )


def test_a_row_that_stands_still_is_found():
    part = MOVED["layer.1"].clone()
    part[7] = BEFORE["layer.1"][7]
    assert "10 of 200" in verdict(**{"layer.1": part}).explanation


@pytest.mark.parametrize("size", [1e-5, 1.0])
def test_a_tensor_that_hardly_moves_or_jumps_is_found(size):
    found = verdict(**{"layer.2": BEFORE["layer.2"] + size})
    assert "layer.2 moves by" in found.explanation


def test_a_gradient_of_rounding_errors_alone_says_nothing():
    noise = {**MOVED, "layer.0": BEFORE["layer.0"] + 1e-6}
    much = {**MOVED, "layer.0": BEFORE["layer.0"] + 1e-4}
    assert motion([motion_of(BEFORE, much)], [motion_of(BEFORE, noise)], ANSWERS, ANSWERS).passed


@pytest.mark.parametrize("answer", [Answer(math.nan, 1.0, True), Answer(2.0, math.inf, True), Answer(2.0, 1.0, False)])
def test_a_step_that_was_not_taken_is_found_unless_the_other_engine_took_none_either(answer):
    same = [motion_of(BEFORE, MOVED)]
    found = motion(same, same, [*ANSWERS, answer], [*ANSWERS, ANSWERS[0]])
    assert not found.passed
    assert "step 4 of the timed run was not applied" in found.explanation
    assert motion(same, same, [*ANSWERS, answer], [*ANSWERS, answer]).passed
