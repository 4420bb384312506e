"""G7.replay: how far a block is from the reference's, against how far a known-good engine is."""

from __future__ import annotations

import math

import pytest
import torch

from forgetrain.engine.contract import Shard
from forgetrain.gates.replay import Outcome, replay, replay_distance, step_distance
from tests.tiny import tiny_target

RECIPE = tiny_target().recipe
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")


def state(value: float, error: float = 0.0) -> dict[str, Shard]:
    made = {}
    for number, name in enumerate(NAMES):
        tensor = torch.full((10,), value) + error * torch.randn(10, generator=torch.Generator().manual_seed(number))
        made[f"exp_avg/{name}"] = Shard(tensor, (10,), (0,))
    return made


BEFORE, DUE = state(0.5), Outcome([2.0, 1.0], [3.0, 3.0], state(1.0))


def distance(losses: list[float], after: dict[str, Shard], norms: tuple[float, ...] = (3.0, 3.0)) -> dict[str, float]:
    return replay_distance(BEFORE, Outcome(losses, norms, after), DUE, RECIPE, steps=2)


def test_distance_is_relative_to_what_the_block_added():
    kinds = ("model.layers.*.mlp.up_proj.weight", "model.norm.weight", "loss", "grad_norm")
    assert distance([2.0, 1.0], state(1.0)) == dict.fromkeys(kinds, 0.0)
    nothing = state(0.5 * RECIPE.beta1**2)  # as if no gradient had come
    assert distance([2.0, 1.0], nothing)["model.norm.weight"] == pytest.approx(1.0)
    assert distance([2.0, 1.01], state(1.0))["loss"] == pytest.approx(0.01)
    assert distance([2.0, 1.0], state(1.0), norms=(3.0, 3.3))["grad_norm"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("error", "losses", "worst"),
    [
        (1e-4, [2.0, 1.0], None),
        (1e-1, [2.0, 1.0], "model"),
        (math.nan, [2.0, 1.0], "model"),
        (0.0, [2.0, 1.01], "loss"),
        (0.0, [2.0, math.nan], "loss"),
    ],
)
def test_verdict(error, losses, worst):
    good = distance([2.0, 1.0], state(1.0, 1e-4))
    verdict = replay(distance(losses, state(1.0, error)), good, precision="fp32", steps=(4, 6))
    assert verdict.passed is (worst is None)
    assert worst is None or str(verdict.first_divergence).startswith(worst)


def test_what_a_known_good_engine_reaches_is_allowed_a_few_times():
    far = distance([2.0, 1.0], state(1.0, 0.1))
    assert replay(far, far, precision="fp32", steps=(0, 2)).passed


def test_what_is_not_finite_is_wrong_however_far_the_known_good_engine_is():
    lost = distance([2.0, 1.0], state(math.inf))
    assert not replay(lost, lost, precision="fp32", steps=(0, 2)).passed


def test_where_nothing_is_due_nothing_is_right():
    kept = state(0.5 * RECIPE.beta1**2)
    still = replay_distance(BEFORE, Outcome([1.0], [1.0], kept), Outcome([1.0], [1.0], kept), RECIPE, steps=2)
    assert max(still.values()) == 0.0
    moved = replay_distance(BEFORE, Outcome([1.0], [1.0], state(1.0)), Outcome([1.0], [1.0], kept), RECIPE, steps=2)
    assert moved["model.norm.weight"] > 1e5  # what rounding leaves of nothing


def stepped(value: float, names: tuple[str, ...] = ("master", "exp_avg_sq")) -> dict[str, Shard]:
    shape = torch.full((100,), value)
    return {
        f"{kind}/model.norm.weight": Shard(shape if kind in names else shape * 0, (100,), (0,))
        for kind in ("master", "exp_avg_sq")
    }


@pytest.mark.parametrize("state", ["master", "exp_avg_sq"])
def test_a_step_that_is_left_out_shows_in_masters_and_second_moments(state):
    before, due = stepped(0.0), Outcome([1.0], [1.0], stepped(1.0))
    assert step_distance(before, due, due) == {"model.norm.weight#master": 0.0, "model.norm.weight#exp_avg_sq": 0.0}
    found = step_distance(
        before, Outcome([1.0], [1.0], stepped(1.0, names=tuple({"master", "exp_avg_sq"} - {state}))), due
    )
    assert found[f"model.norm.weight#{state}"] == pytest.approx(1.0, abs=0.03)  # but for a few numbers
    verdict = replay(found, dict.fromkeys(found, 0.0), precision="bf16", steps=(0, 1))
    assert verdict.first_divergence == f"model.norm.weight#{state}"


def test_a_few_numbers_may_step_either_way():
    before, due, found = stepped(0.0), Outcome([1.0], [1.0], stepped(1.0)), stepped(1.0)
    found["master/model.norm.weight"].tensor[:4] = -1.0
    assert step_distance(before, Outcome([1.0], [1.0], found), due)["model.norm.weight#master"] == 0.0
