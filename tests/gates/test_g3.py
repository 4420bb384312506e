"""G3: bits hold across ranks and across a restart."""

from __future__ import annotations

from forgetrain.gates.g3 import g3
from tests.gates.records import trajectory


def test_both_parts_equal_pass():
    verdict = g3(trajectory(5), trajectory(5), trajectory(10), trajectory(10), sandboxed=True)
    assert verdict.passed
    assert (verdict.statistic, verdict.threshold, verdict.margin) == (15, 15, 0)
    assert verdict.sandboxed
    assert "over 5 steps" in verdict.explanation
    assert "over 10 steps" in verdict.explanation


def test_ranks_that_part_from_the_reference_are_named():
    verdict = g3(trajectory(5), trajectory(5, grad_norm=1.5), trajectory(3), trajectory(3))
    assert not verdict.passed
    assert verdict.first_divergence == "world size 2, step 4: grad_norm"
    assert verdict.explanation == "world size 2: step 4: grad_norm is 1.5, the reference has 1.0"
    assert verdict.detail["part"] == "world size 2"


def test_a_resumed_run_that_parts_is_named():
    verdict = g3(trajectory(5), trajectory(5), trajectory(3), trajectory(3, weight_hash="another"))
    assert not verdict.passed
    assert verdict.first_divergence == "resume, step 2: weight_hash"
    assert "the uninterrupted run has 'hash 2'" in verdict.explanation


def test_a_run_of_other_length_fails():
    assert "number of steps" in g3(trajectory(5), trajectory(4), trajectory(3), trajectory(3)).explanation


def test_what_was_not_run_does_not_pass():
    assert g3([], [], trajectory(3), trajectory(3)).explanation == "world size 2: nothing was run"
    assert g3(trajectory(3), trajectory(3), [], [], ranks=4).explanation == "resume: nothing was run"
    assert not g3(trajectory(3), trajectory(3), [], []).passed
