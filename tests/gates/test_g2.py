"""G2: a trajectory equals the reference's step by step."""

from __future__ import annotations

import math

import pytest

from forgetrain.gates.g2 import first_parting, g2
from tests.gates.records import trajectory


def test_equal_trajectories_pass():
    verdict = g2(trajectory(5), trajectory(5), steps=5, seed=7)
    assert verdict.passed
    assert (verdict.statistic, verdict.threshold, verdict.margin) == (5, 5, 0)
    assert verdict.detail == {"seed": 7, "parting": None}


@pytest.mark.parametrize(
    ("quantity", "value"),
    [
        ("loss", math.nextafter(1.0, 2)),
        ("grad_norm", math.nextafter(1.0, 2)),
        ("applied", False),
        ("weight_hash", "another"),
    ],
)
def test_the_first_step_and_quantity_that_part_are_named(quantity, value):
    due, found = trajectory(5), trajectory(5, **{quantity: value})
    verdict = g2(due, found, steps=5)
    assert not verdict.passed
    assert (verdict.statistic, verdict.margin) == (4, -1)
    assert verdict.first_divergence == f"step 4: {quantity}"
    assert verdict.detail["parting"] == {
        "step": 4,
        "quantity": quantity,
        "expected": getattr(due[4], quantity),
        "actual": value,
    }
    assert f"the trajectories part at step 4: {quantity} is {value!r}, the reference has" in verdict.explanation


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_equal_nothing_not_even_themselves(value):
    parting = first_parting(trajectory(3, loss=value), trajectory(3, loss=value))
    assert parting is not None
    assert (parting.step, parting.quantity) == (2, "loss")


def test_a_shorter_run_is_no_pass():
    assert "number of steps is 3, the reference has 5" in g2(trajectory(5), trajectory(3), steps=5).explanation
    verdict = g2(trajectory(3), trajectory(3), steps=5)
    assert not verdict.passed
    assert verdict.margin == -2
    assert verdict.explanation == "only 3 of 5 steps were run"
    assert not g2([], [], steps=1).passed
