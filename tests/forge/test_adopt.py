"""An engine that is aligned again is another file: whoever stood on the old one, stands on the new one."""

from __future__ import annotations

import json

import pytest

from forgetrain.durable import sha256_file
from forgetrain.forge.proposers.base import Proposal
from forgetrain.report.forge import write_forge_report
from tests.forge.test_optimise import Script, Verdicts, loop, prepared
from tests.forge.test_verification import FAST, Turncoat


def align_again(runs, target, header="# another golden record\n"):
    """As ``collect`` and ``align`` leave it: the same engine under a header that names the new record."""
    file = runs / target.name / "engine" / "engine.py"
    file.write_text(file.read_text() + header)
    verdicts = json.loads((file.parent / "verdicts.json").read_text())
    (file.parent / "verdicts.json").write_text(json.dumps({**verdicts, "sha256": sha256_file(file)}))
    return file.read_text()


def test_an_engine_that_was_aligned_again_takes_the_place_of_the_old_one(tmp_path):
    target, judge = prepared(tmp_path), Verdicts()
    loop(target, tmp_path, Script(["bad\n"])).run()
    new = align_again(tmp_path, target)
    run = loop(target, tmp_path, Script(["speed = 2\n"]), judge)
    outcome = run.run()
    assert judge.seen == ["speed = 2\n"] * 3  # nobody judged the old one as if it were a candidate
    assert (outcome.elections, outcome.gain, outcome.verified) == (1, pytest.approx(2.0), True)
    assert run._source(run.baseline) == new
    write_forge_report(target, run.ledger, tmp_path / "forge.html")


def test_an_engine_that_is_aligned_back_to_what_it_was_is_champion_once_more(tmp_path):
    target = prepared(tmp_path)
    loop(target, tmp_path, Script([])).run()
    align_again(tmp_path, target)
    loop(target, tmp_path, Script([])).run()
    run = loop(prepared(tmp_path), tmp_path, Script([]))
    outcome = run.run()
    assert (outcome.champion, outcome.elections, outcome.gain) == (run.baseline, 0, 1.0)


def test_a_champion_on_the_old_engine_that_is_deposed_leaves_the_new_one(tmp_path):
    target, lines = prepared(tmp_path), []
    loop(target, tmp_path, Script([FAST])).run()
    align_again(tmp_path, target)
    run = loop(target, tmp_path, Script(["bad\n"]), Turncoat(FAST, after=0), say=lines.append)
    outcome = run.run()
    assert (outcome.champion, outcome.verified, outcome.gain) == (run.baseline, False, 1.0)
    assert sum("is deposed; the aligned engine is champion" in line for line in lines) == 1


def test_a_loop_of_a_part_of_the_gates_goes_on_from_the_new_engine(tmp_path):
    target, ships = prepared(tmp_path), Proposal("bad ships\n", "ships")
    loop(target, tmp_path, Script([]), gates=["G4", "G7"]).replay(ships, ["G4", "G7"])
    align_again(tmp_path, target)
    quick = loop(target, tmp_path, Script(["speed = 2\n"]), gates=["G4", "G7"])
    assert quick.replay(ships, ["G4", "G7"]) is None
    assert quick.run().gain == pytest.approx(2.0)


def test_an_adoption_that_was_cut_off_is_done_again(tmp_path, monkeypatch):
    target = prepared(tmp_path)
    first = loop(target, tmp_path, Script([]))

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(first.ledger, "end_judging", cut_off)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    run = loop(target, tmp_path, Script([FAST]))
    assert run.run().gain == pytest.approx(1.2)
