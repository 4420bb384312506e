from __future__ import annotations

from forgetrain.forge.stuck import ELECTED, rung


def test_nothing_is_said_before_anything_failed():
    assert rung([]) == rung([ELECTED]) == rung(["rejected by G4", ELECTED])


def test_the_same_failure_three_times_is_named():
    assert "rejected by G4" in rung(["rejected by G4"] * 3).notes[0]
    assert rung(["rejected by G4", "rejected by G5", "rejected by G4"]).notes == ()
    assert rung(["rejected by G4", ELECTED, "rejected by G4", "rejected by G4"]).notes == ()


def test_the_ladder_climbs_and_an_election_brings_it_down():
    failures = [f"rejected {number}" for number in range(25)]
    assert rung(failures[:5]).other_parent
    assert not rung(failures[:6]).other_parent
    assert not rung(failures[:9]).catalogue
    assert rung(failures[:10]).catalogue
    assert not rung(failures[:19]).stop
    assert rung(failures[:20]).stop
    assert rung([*failures, ELECTED]) == rung([])
