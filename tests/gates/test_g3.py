"""G3: bits hold across ranks and across a restart."""

from __future__ import annotations

import math

import pytest

from forgetrain.gates.g3 import g3, g3_near
from forgetrain.gates.verdict import Verdict
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


@pytest.mark.parametrize(("found", "passes"), [(2.00001, True), (2.001, False), (math.nan, False)])
def test_an_evaluation_is_held_to_the_order_of_sums(found, passes):
    verdict = g3(trajectory(3), trajectory(3), trajectory(3), trajectory(3), evaluations=(2.0, found))
    assert verdict.passed is passes
    assert verdict.first_divergence == (None if passes else "world size 2, step 1: evaluation")


def test_what_was_not_run_does_not_pass():
    assert g3([], [], trajectory(3), trajectory(3)).explanation == "world size 2: nothing was run"
    assert g3(trajectory(3), trajectory(3), [], [], ranks=4).explanation == "resume: nothing was run"
    assert not g3(trajectory(3), trajectory(3), [], []).passed


HONEST = {"loss": 1e-7, "evaluation": 1e-7, "grad_norm": 2e-7, "model.norm.weight": 1e-6}


def near(found=HONEST, due=None, resumed=None, known_good=HONEST, **options):
    due = trajectory(3) if due is None else due
    resumed = due if resumed is None else resumed
    return g3_near(found, known_good, due, resumed, layout="2 data ranks", precision="fp32", **options)


def test_what_rounding_explains_passes():
    verdict = near()
    assert verdict.passed
    assert 0 < verdict.statistic < 1  # type: ignore[operator]
    assert verdict.explanation.endswith("go on bit for bit over 3 steps")


@pytest.mark.parametrize(("kind", "distance"), [("loss", 6e-6), ("grad_norm", 8e-5), ("model.norm.weight", 9e-4)])
def test_what_a_seed_made_of_rounding_passes_where_the_known_good_engine_was_lucky(kind, distance):
    """The worst of an honest engine in 450 runs."""
    assert near(HONEST | {kind: distance}).passed


def test_in_bf16_what_a_seed_made_of_rounding_passes_on_four_ranks():
    """The worst of honest engines in 28 runs; a norm that was 0.037 off failed in the 29th."""
    due, worst = trajectory(3), HONEST | {"grad_norm": 0.052, "model.norm.weight": 0.155}
    assert g3_near(worst, HONEST, due, due, layout="2 data ranks x 2 tensor ranks", precision="bf16").passed
    without_a_share = HONEST | {"model.norm.weight": 0.5}
    assert not g3_near(without_a_share, HONEST, due, due, layout="4 data ranks", precision="bf16").passed


@pytest.mark.parametrize(
    ("kind", "distance"),
    [("loss", 1e-4), ("evaluation", 1e-4), ("grad_norm", 1e-3), ("grad_norm", math.inf), ("model.norm.weight", 0.1)],
)
def test_what_is_further_away_is_named(kind, distance):
    verdict = near(HONEST | {kind: distance})
    assert not verdict.passed
    assert verdict.first_divergence == kind
    assert verdict.explanation.startswith(f"2 data ranks: {kind} is {distance:.3g} away")
    assert near(HONEST | {kind: distance}, known_good=HONEST | {kind: distance / 3}).passed is (distance < math.inf)


def test_a_layout_that_parts_from_itself_after_a_restart_is_named():
    verdict = near(resumed=trajectory(3, weight_hash="another"))
    assert not verdict.passed
    assert verdict.first_divergence == "resume, step 2: weight_hash"
    assert verdict.explanation.startswith("resume on 2 data ranks: step 2: weight_hash")
    assert not near(resumed=trajectory(2)).passed
    assert not near(due=[], resumed=[]).passed


def test_an_engine_that_is_not_deterministic_resumes_within_a_tolerance_of_losses():
    assert near(resumed=trajectory(3, loss=3.001, weight_hash="another"), tolerance=1e-3).passed
    assert not near(resumed=trajectory(3, loss=3.1), tolerance=1e-3).passed


def test_a_restart_on_all_ranks_counts_too():
    parts = trajectory(3), trajectory(3, loss=0.5)
    verdict = g3(*(trajectory(3) for _ in range(4)), ranks=4, restarted_ranks=parts)
    assert verdict.first_divergence == "resume on 4 ranks, step 2: loss"


def test_an_update_that_does_not_follow_from_what_was_restored_is_named():
    wrong = Verdict("G4.update", False, first_divergence="exp_avg_sq/lm_head.weight", explanation="it is not")
    verdict = near(tolerance=1e-3, update=wrong)
    assert not verdict.passed
    assert verdict.first_divergence == "resume, exp_avg_sq/lm_head.weight"
    assert verdict.explanation == "resume on 2 data ranks: it is not"
    assert near(tolerance=1e-3, update=Verdict("G4.update", True)).passed
