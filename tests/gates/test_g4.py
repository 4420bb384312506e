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


def clipped_by(*norms: float, error: float = 1e-6, told: float = 1.0, one_kind: float = 0.0) -> ErrorPool:
    """Values around 1 and, of the last kind, which an error of the norm shows in first, a hundredth of the errors; each
    batch clipped by a norm that is off. ``told``: what of that is returned as the norm's."""
    made = ErrorPool()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)
    exact = [(name, torch.ones(100, dtype=torch.float64)) for name in NAMES]
    for norm in norms:
        values = [(name, 1 + sign * error * (0.01 if name == NAMES[-1] else 1.0)) for name in NAMES]
        values = [(name, (value / (1 + norm)).float()) for name, value in values]
        values[0] = NAMES[0], values[0][1] * (1 + one_kind)
        made.add_batch(exact, values, told * norm)
    return made


HONEST = (4e-5, -2e-5, 4e-6, 2e-5)


@pytest.mark.parametrize(
    ("norms", "options", "passed"),
    [
        ((1e-5, -2e-5, 4e-6, 2e-5), {}, True),
        (HONEST, {}, True),  # 2.7 times the reference's, as one of twenty such sets is
        ((2e-4, -1e-4, 4e-5, 2e-4), {}, False),
        (HONEST, {"told": 0.0}, False),
        (HONEST, {"one_kind": 1e-3}, False),  # no norm scales one kind alone
        ((math.nan, 0.0, 0.0, 0.0), {}, False),
    ],
)
def test_an_error_of_the_norm_is_one_number_of_a_batch(norms, options, passed):
    reference = clipped_by(1e-5, -1e-5, 1e-5, 6e-6)
    verdict = g4(clipped_by(*norms, **options), reference, ratio=2.0)
    assert verdict.passed is passed, verdict.explanation
    assert verdict.detail["norm"]["reference"] == pytest.approx(9e-6, rel=0.1)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_reference_allows_nothing(broken):
    reference = clipped_by(1e-5, -1e-5, 1e-5, 6e-6)
    reference.norms[-1] = broken
    assert not g4(clipped_by(*HONEST), reference, ratio=2.0).passed


def test_a_norm_may_err_by_roundings_where_the_references_does_not():
    exact = clipped_by(*[0.0] * 4, error=0.0)
    assert g4(clipped_by(*[6e-7] * 4, error=0.0), exact, ratio=2.0).passed is False
    assert g4(clipped_by(*[1e-7] * 4, error=0.0), exact, ratio=2.0).passed


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
