"""The room's doors."""

from __future__ import annotations

import hashlib

from forgetrain.forge.room import Room
from tests.forge.test_optimise import Script, Verdicts, another, loop, prepared
from tests.tiny import tiny_target


def test_the_champion_is_there_before_anything_was_asked(tmp_path):
    target = prepared(tmp_path)
    engine = (tmp_path / target.name / "engine" / "engine.py").read_text()
    assert Room(loop(target, tmp_path, Script([]))).champion() == engine
    assert "error" in Room(loop(prepared(tmp_path / "other"), tmp_path / "other", Script([]))).profile()


def test_what_was_submitted_is_told_whatever_another_target_does_meanwhile(tmp_path):
    target = prepared(tmp_path)
    run = loop(target, tmp_path, Script([]))
    other = run.ledger.add_target(tiny_target("tied"))

    class Meanwhile(Verdicts):
        def judge(self, *files, **options):
            run.ledger.begin_attempt(other, proposer="catalogue")
            return super().judge(*files, **options)

    run.judge = Meanwhile()
    told = Room(run).submit("bad\n", "mine")
    assert told["outcome"] == "rejected by G4"
    assert told["candidate"] == hashlib.sha256(b"bad\n").hexdigest()
    assert told["verdicts"] == [{"gate": "G4", "pass": False, "purpose": "gates"}]


def test_verdicts_on_the_same_file_for_another_target_are_not_this_one_s(tmp_path):
    target = prepared(tmp_path)
    for candidate in (target, another(target)):
        told = Room(loop(candidate, tmp_path, Script([]))).submit("bad\n", "mine")
        assert [verdict["gate"] for verdict in told["verdicts"]] == ["G4"]
