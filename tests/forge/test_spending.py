"""What a proposer spends counts while it works, so that no kill gives it back."""

from __future__ import annotations

import time

import pytest

from forgetrain.errors import UserError
from forgetrain.forge import spending
from forgetrain.judge.ledger import Ledger
from tests.forge.test_optimise import Script, loop, prepared
from tests.tiny import tiny_target


class Works:
    """A proposer that is at work until the ledger tells of it, or for ten seconds, and is then cut off."""

    name = "works"

    def __init__(self, runs, key):
        self.runs, self.key, self.counted = runs, key, 0.0

    def propose(self, brief):
        deadline = time.monotonic() + 10
        with Ledger(self.runs / "ledger") as ledger:
            while not self.counted and time.monotonic() < deadline:
                time.sleep(0.02)
                self.counted = ledger.spent(self.key).seconds
        raise KeyboardInterrupt


def test_seconds_count_while_a_proposer_works(tmp_path, monkeypatch):
    monkeypatch.setattr(spending, "EVERY", 0.05)
    run = loop(prepared(tmp_path), tmp_path, Script([]))
    run.proposer = Works(tmp_path, run.key)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.proposer.counted >= 0.05
    assert run.ledger.spent(run.key).seconds >= run.proposer.counted


@pytest.mark.filterwarnings("error")  # a thread that broke off is a warning
def test_a_ledger_that_is_locked_for_a_moment_stops_no_counting(tmp_path, monkeypatch):
    tried = []

    def locked(*_, **__):
        tried.append(1)
        raise UserError("is locked by another process", remedy="wait until it has ended")

    monkeypatch.setattr(spending, "EVERY", 0.01)
    monkeypatch.setattr(spending, "Ledger", locked)
    with Ledger(tmp_path) as ledger:
        attempt = ledger.begin_attempt(ledger.add_target(tiny_target()), proposer="x")
        with spending.spending(ledger, attempt, time.monotonic()):
            deadline = time.monotonic() + 10
            while len(tried) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert len(tried) >= 2
