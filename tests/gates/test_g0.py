"""G0 judges the reference: repeatable, and right."""

from __future__ import annotations

import math

import pytest
import torch

from forgetrain.gates.g0 import NEAR, g0, relative_errors
from tests.gates.records import trajectory

RUNS = {"world size 1": (trajectory(4), trajectory(4)), "world size 2": (trajectory(4), trajectory(4))}
ERRORS = {"megatron against the oracle, step 0": {"a": 2e-7, "b": 4e-7}, "megatron against transformers": {"a": 3e-7}}


def test_it_passes_with_the_largest_error_as_its_statistic():
    verdict = g0(RUNS, {}, ERRORS)
    assert verdict.passed
    assert (verdict.statistic, verdict.threshold) == (4e-7, NEAR)
    assert verdict.margin == pytest.approx(NEAR - 4e-7)
    assert verdict.first_divergence is None
    assert "4 steps at world size 1, 4 steps at world size 2" in verdict.explanation
    assert verdict.detail["errors"]["megatron against transformers"] == 3e-7


def test_two_runs_that_part_fail_with_the_step_named():
    runs = {**RUNS, "world size 2": (trajectory(4), trajectory(4, loss=2.0000002))}
    verdict = g0(runs, {}, ERRORS)
    assert not verdict.passed
    assert "world size 2: two runs of the reference are not bit-equal: step 3: loss is 2.0000002" in verdict.explanation


def test_evidence_that_differs_between_two_runs_fails_with_the_tap_named():
    verdict = g0(RUNS, {"lm_head#fwd@0": "1 of 4 elements differ", "loss#fwd@0": "too"}, ERRORS)
    assert not verdict.passed
    assert verdict.first_divergence == "lm_head#fwd@0"
    assert "1 of 4 elements differ" in verdict.explanation


def test_an_error_above_the_threshold_fails_with_the_tensor_named():
    """What a missing zero_grad() does: the first step is right, and the second far off."""
    errors = {**ERRORS, "megatron against the oracle, step 1": {"a": 1e-7, "model.norm.weight": 0.7}}
    verdict = g0(RUNS, {}, errors)
    assert not verdict.passed
    assert verdict.first_divergence == "model.norm.weight#clipped"
    assert verdict.statistic == 0.7
    assert verdict.margin is not None
    assert verdict.margin < 0
    assert "megatron against the oracle, step 1" in verdict.explanation


@pytest.mark.parametrize(("error", "passed"), [(NEAR, True), (math.nextafter(NEAR, 1), False), (math.inf, False)])
def test_the_threshold_itself_is_allowed(error, passed):
    assert g0(RUNS, {}, {"oracle": {"a": error}}).passed is passed


def test_without_evidence_nothing_passes():
    assert "nothing was run" in g0({"world size 1": ([], [])}, {}, ERRORS).explanation
    assert not g0({"world size 1": ([], [])}, {}, ERRORS).passed
    assert not g0(RUNS, {}, {}).passed
    assert not g0(RUNS, {}, {"oracle": {}}).passed


def test_what_was_not_compared_is_said():
    verdict = g0(RUNS, {}, ERRORS, ["transformers is not installed"])
    assert verdict.passed
    assert verdict.explanation.endswith("not compared: transformers is not installed")
    assert verdict.detail["skipped"] == ["transformers is not installed"]


def test_relative_errors():
    due = {"same": torch.ones(3), "off": torch.tensor([3.0, 4.0]), "zero": torch.zeros(2), "nan": torch.ones(1)}
    due |= {"missing": torch.ones(1), "shape": torch.ones(2)}
    found = {"same": torch.ones(3), "off": torch.tensor([3.0, 4.5]), "zero": torch.tensor([0.0, 0.25])}
    found |= {"nan": torch.tensor([math.nan]), "shape": torch.ones(1, 2)}
    errors = relative_errors(found, due)
    assert errors["same"] == 0.0
    assert errors["off"] == pytest.approx(0.1)
    assert errors["zero"] == 0.25  # nothing to be relative to
    assert errors["nan"] == errors["missing"] == errors["shape"] == math.inf
