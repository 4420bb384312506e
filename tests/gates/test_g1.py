"""G1: the first name at which an engine leaves the reference, or that it never does."""

from __future__ import annotations

import math

import pytest
import torch

from forgetrain.gates.g1 import Comparison, evidence_names, evidence_op, first_divergence, g1
from forgetrain.spec.taps import tap_names
from tests.tiny import tiny_target

MODEL = tiny_target().model
Q = "model.layers.1.self_attn.q_rope#fwd@0"
NORM = "model.layers.0.input_layernorm#fwd@0"


def stream(**changes):
    """Three taps; a change replaces the second."""
    second = changes.get("second", torch.arange(6.0).view(2, 3))
    return [(NORM, torch.ones(2)), (Q, second), ("loss#fwd@0", torch.tensor(2.0))]


def test_equal_streams_pass():
    divergence, equal = first_divergence(stream(), stream(), MODEL)
    assert (divergence, equal) == (None, 3)
    verdict = g1(divergence, equal, sandboxed=True)
    assert verdict.passed
    assert verdict.sandboxed
    assert verdict.statistic == 3


def test_the_first_difference_is_named_with_op_layer_count_ulp_index_and_both_values():
    other = torch.arange(6.0).view(2, 3)
    other[1, 0] = torch.nextafter(torch.tensor(3.0), torch.tensor(4.0))
    other[1, 2] = torch.nextafter(torch.tensor(5.0), torch.tensor(0.0))
    divergence, equal = first_divergence(stream(), stream(second=other), MODEL)
    assert divergence is not None
    assert divergence.difference is not None
    assert (divergence.tap, divergence.op, divergence.layer, divergence.position) == (Q, "rope", 1, 1)
    assert (divergence.difference.count, divergence.difference.total, divergence.difference.max_ulp) == (2, 6, 1)
    assert divergence.difference.first_index == (1, 0)
    assert (divergence.difference.expected, divergence.difference.actual) == (3.0, 3.000000238418579)
    assert divergence.problem is None
    verdict = g1(divergence, equal)
    assert not verdict.passed
    assert verdict.first_divergence == Q
    assert verdict.statistic == 1
    assert "op rope, layer 1): 2 of 6 elements differ, at most 1 ULP; first at [1, 0]" in verdict.explanation
    assert verdict.as_dict()["detail"]["divergence"]["difference"]["max_ulp"] == 1


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (torch.zeros(3, 2), "has shape [3, 2], the reference [2, 3]"),
        (torch.arange(6).view(2, 3), "is int64, the reference float32"),
        (torch.arange(6.0).view(2, 3).log(), "1 of 6 values are not finite; first at [0, 0]: -inf, the reference has"),
        (torch.full((2, 3), math.nan), "6 of 6 values are not finite"),
    ],
)
def test_what_is_no_matter_of_bits_is_said_in_words(second, words):
    divergence, _ = first_divergence(stream(), stream(second=second), MODEL)
    assert divergence is not None
    assert words in str(divergence)
    assert divergence.problem is not None


def test_a_minus_zero_is_not_a_zero():
    due, found = [("loss#fwd@0", torch.zeros(1))], [("loss#fwd@0", -torch.zeros(1))]
    assert first_divergence(due, found, MODEL)[0] is not None


def test_missing_surplus_and_misplaced_names():
    full = stream()
    missing, equal = first_divergence(full, full[:2], MODEL)
    assert equal == 2
    assert "loss#fwd@0 (op cross_entropy): is missing" in str(missing)
    assert "is more than the reference has" in str(first_divergence(full[:2], full, MODEL)[0])
    swapped, equal = first_divergence(full, [full[0], full[2], full[1]], MODEL)
    assert equal == 1
    assert f"{Q} (op rope, layer 1): is due here, but the engine yields loss#fwd@0" in str(swapped)


def test_nothing_compared_is_no_pass():
    divergence, equal = first_divergence([], [], MODEL)
    assert not g1(divergence, equal).passed


def test_values_can_be_shown_one_by_one():
    comparison = Comparison(stream(), MODEL)
    assert comparison.see(NORM, torch.ones(2)) is None
    divergence = comparison.see(Q, torch.zeros(2, 3))
    assert divergence is not None
    assert comparison.equal == 1
    whole = Comparison(stream(), MODEL)
    assert [whole.see(name, tensor) for name, tensor in stream()] == [None] * 3
    assert whole.end() is None


def test_the_evidence_is_taps_results_and_state_in_the_order_of_an_update():
    names = evidence_names(MODEL, micro_batches=2)
    taps = tap_names(MODEL, 2)
    assert names[: len(taps)] == taps
    assert names[len(taps) : len(taps) + 2] == ["step.loss", "step.grad_norm"]
    state = names[len(taps) + 2 :]
    parameters = list(MODEL.parameter_shapes())
    assert state == [f"{kind}/{p}" for kind in ("exp_avg", "exp_avg_sq", "master") for p in parameters] + ["step"]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("step.loss", "cross_entropy"),
        ("step.grad_norm", "clip"),
        ("step", "adamw"),
        ("exp_avg_sq/model.norm.weight", "adamw"),
        ("model.layers.1.mlp.swiglu#grad@1", "swiglu"),
        ("model.layers.0.self_attn.k_proj.weight#grad", "linear"),
        ("model.norm.weight#clipped", "clip"),
        ("nonsense", "unknown"),
    ],
)
def test_the_op_to_suspect(name, op):
    assert evidence_op(name, MODEL) == op
