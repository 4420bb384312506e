"""G7.replay: how far a block is from the reference's, against how far a known-good engine is."""

from __future__ import annotations

import math

import pytest
import torch

from forgetrain.engine.contract import Shard
from forgetrain.gates.replay import replay, replay_distance
from tests.tiny import tiny_target

RECIPE = tiny_target().recipe
NAMES = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")


def state(value: float, error: float = 0.0) -> dict[str, Shard]:
    made = {}
    for number, name in enumerate(NAMES):
        tensor = torch.full((10,), value) + error * torch.randn(10, generator=torch.Generator().manual_seed(number))
        made[f"exp_avg/{name}"] = Shard(tensor, (10,), (0,))
    return made


BEFORE, DUE = state(0.5), ([2.0, 1.0], state(1.0))


def distance(losses: list[float], after: dict[str, Shard]) -> dict[str, float]:
    return replay_distance(BEFORE, (losses, after), DUE, RECIPE, steps=2)


def test_distance_is_relative_to_what_the_block_added():
    assert distance(*DUE) == {"model.layers.*.mlp.up_proj.weight": 0.0, "model.norm.weight": 0.0, "loss": 0.0}
    nothing = state(0.5 * RECIPE.beta1**2)  # as if no gradient had come
    assert distance([2.0, 1.0], nothing)["model.norm.weight"] == pytest.approx(1.0)
    assert distance([2.0, 1.01], state(1.0))["loss"] == pytest.approx(0.01)


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
