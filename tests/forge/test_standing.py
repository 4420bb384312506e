"""What the ledger says of earlier candidates' speed is what the catalogue was told when they were judged."""

from __future__ import annotations

import time

import pytest

from tests.forge.test_optimise import Script, loop, prepared


def test_a_loop_that_goes_on_tells_the_catalogue_what_it_told_before(tmp_path, monkeypatch):
    now = iter(range(1_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(now))  # a clock that steps back an hour at every look
    target = prepared(tmp_path)
    first = loop(target, tmp_path, Script(["speed = 1.2\n", "speed = 1.1\n", "bad\n", "speed = 1.5\n"]))
    live = {}
    first.catalogue.tell = lambda source, ratio, plan: live.__setitem__(source, ratio)
    outcome = first.run()
    assert outcome.elections == 2
    again = loop(target, tmp_path, Script([]))
    told = {}
    again.catalogue.tell = lambda source, ratio, plan: told.__setitem__(source, ratio)
    again.run()
    aligned = again._source(again.baseline)
    assert told.pop(aligned) is None
    live.pop(aligned, None)
    assert set(told) == {"speed = 1.2\n", "speed = 1.1\n", "bad\n", "speed = 1.5\n"}
    assert told["bad\n"] is None
    assert {key: told[key] for key in told if told[key]} == pytest.approx(
        {
            "speed = 1.2\n": 1.2,
            "speed = 1.1\n": 1.1,
            "speed = 1.5\n": 1.5,
        }
    )
    assert {key: value for key, value in live.items() if value} == pytest.approx(
        {key: value for key, value in told.items() if value}
    )


def test_a_clock_that_steps_back_gives_no_budget_back(tmp_path, monkeypatch):
    now = iter(range(1_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: next(now))
    target = prepared(tmp_path, attempts=3)
    run = loop(target, tmp_path, Script([f"bad {number}\n" for number in range(5)]))
    assert run.run().ended == "3 attempts are made"
    spent = run.ledger.spent(run.key)
    assert spent.attempts == 3
    assert 0 <= spent.seconds < 60
