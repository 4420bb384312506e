"""Costs by op agree with the target's estimate, which counts the same work as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from forgetrain.spec.estimate import estimate_target
from forgetrain.spec.op_costs import OPS, OpCost, op_costs
from forgetrain.spec.target import load_target

TARGETS = Path(__file__).parents[2] / "targets"


@pytest.mark.parametrize("name", ["nano-cpu", "minicpm5-1b-h200"])
def test_the_ops_sum_to_the_estimate(name):
    target = load_target(TARGETS / f"{name}.toml")
    costs, estimate = op_costs(target), estimate_target(target)
    assert tuple(costs) == OPS
    tokens, model = estimate.tokens_per_step, target.model
    assert costs["linear"].flops + costs["attention"].flops == tokens * estimate.flops.causal
    assert costs["adamw"].bytes == estimate.traffic.optimizer
    assert costs["cross_entropy"].bytes == tokens * estimate.traffic.cross_entropy
    size = 2 if target.precision.dtype == "bf16" else 4
    delta = 2 * model.num_attention_heads * model.head_dim * model.num_hidden_layers * size  # a pass of attention's own
    of_layers = sum(costs[op].bytes for op in ("rmsnorm", "rope", "swiglu"))
    assert of_layers + tokens * delta == tokens * (estimate.traffic.forward + estimate.traffic.backward)


def test_products_are_intense_and_elementwise_ops_are_not():
    costs = op_costs(load_target(TARGETS / "minicpm5-1b-h200.toml"))
    assert costs["linear"].intensity > 500
    assert all(costs[op].intensity < 10 for op in ("rmsnorm", "rope", "swiglu", "cross_entropy", "adamw", "clip"))


def test_the_roofline_is_whichever_binds():
    assert OpCost(100, 10).seconds(50, 100) == 2
    assert OpCost(100, 1000).seconds(50, 100) == 10
