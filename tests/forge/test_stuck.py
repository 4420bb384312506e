from __future__ import annotations

from forgetrain.forge.stuck import rung

ELECTED = {"outcome": "accepted", "reason": "elected, 1.200 times the champion"}
REFUSED = {"outcome": "failed", "reason": "the model's server refused"}
CUT_OFF = {"outcome": "interrupted", "reason": ""}


def rejected(by):
    return {"outcome": "rejected", "reason": f"rejected by {by}"}


def test_nothing_is_said_before_anything_failed():
    assert rung([]) == rung([ELECTED]) == rung([rejected("G4"), ELECTED])


def test_the_same_failure_three_times_is_named():
    g4, g5 = rejected("G4"), rejected("G5")
    assert "rejected by G4" in rung([g4] * 3).notes[0]
    assert rung([g4, g5, g4]).notes == ()
    assert rung([g4, ELECTED, g4, g4]).notes == ()
    assert rung([CUT_OFF] * 3).notes == ()


def test_failures_that_differ_in_their_figures_are_the_same():
    lost = [rejected(f"G7, {ratio} times the champion") for ratio in ("0.941", "0.883", "1.002")]
    assert "rejected by G7" in rung(lost).notes[0]


def test_the_ladder_climbs_and_an_election_brings_it_down():
    failures = [rejected(f"gate {chr(97 + number)}") for number in range(25)]
    assert rung(failures[:5]).other_parent
    assert not rung(failures[:6]).other_parent
    assert not rung(failures[:9]).catalogue
    assert rung(failures[:10]).catalogue
    assert not rung(failures[:19]).stop
    assert rung(failures[:20]).stop
    assert rung([*failures, ELECTED]) == rung([])


def test_a_new_call_is_not_given_up_for_what_earlier_ones_did():
    failures = [rejected("G4")] * 25
    fresh = rung(failures, call=25)
    assert (fresh.catalogue, fresh.stop) == (False, False)
    assert fresh.notes  # but it is told
    assert not rung([*failures, *failures[:9]], call=25).catalogue
    assert rung([*failures, *failures[:10]], call=25).catalogue
    assert rung([*failures, *failures[:20]], call=25).stop
    assert not rung([*failures, *failures[:15], ELECTED, *failures[:9]], call=25).catalogue


def test_what_brought_no_candidate_hands_nothing_over_but_stops_it_all_the_same():
    failures = [REFUSED, CUT_OFF] * 9
    assert not rung([*failures, rejected("G4")]).catalogue
    assert rung([*failures, REFUSED, REFUSED]).stop
