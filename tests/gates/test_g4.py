"""G4: errors pooled by kind, measured against the reference's."""

from __future__ import annotations

import math

import pytest
import torch

from forgetrain.gates.g4 import FLOOR_EPS, ErrorPool, g4

NAMES = ("model.layers.0.mlp.up_proj.weight#clipped", "model.layers.1.mlp.up_proj.weight#clipped", "model.norm#clipped")


def pool(error: float, *, batches: int = 4, worst: float = 0.0, names=NAMES) -> ErrorPool:
    """Every value is 1 plus or minus ``error``; one of them ``worst`` besides."""
    made = ErrorPool()
    sign = torch.tensor([1.0, -1.0]).repeat(50)
    for _ in range(batches):
        exact = [(name, torch.ones(100, dtype=torch.float64)) for name in names]
        values = [(name, (torch.ones(100, dtype=torch.float64) + sign * error)) for name in names]
        values[0][1][0] += worst
        made.add_batch(exact, values)
    return made


@pytest.mark.parametrize(("ratio", "passed"), [(1.0, True), (1.9, True), (2.1, False), (math.nan, False)])
def test_the_reference_s_error_is_the_measure(ratio, passed):
    verdict = g4(pool(ratio * 1e-3), pool(1e-3), ratio=2.0)
    assert verdict.passed is passed
    assert (verdict.first_divergence is None) is passed
    assert set(verdict.detail["kinds"]) == {"model.layers.*.mlp.up_proj.weight#clipped", "model.norm#clipped"}


def test_an_exact_reference_leaves_a_floor():
    eps = torch.finfo(torch.float64).eps
    assert g4(pool(0.5 * FLOOR_EPS * eps), pool(0.0), ratio=2.0).passed
    assert not g4(pool(1e-12), pool(0.0), ratio=2.0).passed


def test_one_large_error_is_flagged_and_one_kind_is_enough_to_fail():
    flagged = g4(pool(1e-3, worst=0.5), pool(1e-3), ratio=100.0)
    assert flagged.passed
    assert flagged.detail["flagged"] == ["model.layers.*.mlp.up_proj.weight#clipped"]
    failed = g4(pool(1e-3, worst=0.5), pool(1e-3), ratio=2.0)
    assert not failed.passed
    assert failed.first_divergence == "model.layers.*.mlp.up_proj.weight#clipped"


def test_missing_evidence_fails():
    assert not g4(pool(1e-3, batches=3), pool(1e-3, batches=3), ratio=2.0).passed
    assert not g4(pool(1e-3, names=NAMES[:1]), pool(1e-3), ratio=2.0).passed
    assert not g4(ErrorPool(), ErrorPool(), ratio=2.0).passed
    with pytest.raises(ValueError, match="the oracle has"):
        ErrorPool().add_batch([("a", torch.ones(2))], [("b", torch.ones(2))])
