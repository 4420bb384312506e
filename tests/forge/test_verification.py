"""The champion is judged again from time to time, and on another machine; one that fails is deposed."""

from __future__ import annotations

import json

import pytest

from forgetrain.errors import UserError
from forgetrain.forge import optimise
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.runner import Judgement
from tests.forge.test_optimise import Script, Verdicts, loop, prepared


class Turncoat(Verdicts):
    """From the ``after``-th judging of this source on, and ``times`` times, it fails at ``gate``."""

    def __init__(self, source, gate="G6", after=2, times=1000):
        super().__init__()
        self.source, self.gate, self.after, self.times = source, gate, after, times

    def judge(self, file, *, on_verdict, **options):
        found = super().judge(file, on_verdict=lambda verdict: None, **options)
        count = self.seen.count(self.source)
        if self.seen[-1] == self.source and self.after < count <= self.after + self.times:
            found = Judgement(found.candidate, [Verdict(self.gate, False)], sandboxed=True)
        for verdict in found.verdicts:
            on_verdict(verdict)
        return found


FAST, FASTER = "speed = 1.2\n", "speed = 1.5\n"


def failing(count):
    return [f"bad {number}\n" for number in range(count)]


def test_a_champion_is_judged_again_every_so_many_attempts(tmp_path):
    target = prepared(tmp_path, verify_every=3, attempts=9)
    judge, lines = Verdicts(), []
    run = loop(target, tmp_path, Script([FAST, *failing(20)]), judge, say=lines.append)
    run.run()
    again = run.ledger.query("SELECT id FROM judgings WHERE purpose = 'verification' AND passed ORDER BY number")
    numbers = [
        run.ledger.query("SELECT number FROM attempts WHERE id = ?", (row["id"].removeprefix("verification-"),))
        for row in again
    ]
    assert numbers == [[{"number": 4}], [{"number": 7}]]  # and none at the end, three attempts after the last
    assert judge.seen.count(FAST) == 2 + 2
    assert sum("since the champion was verified: it is judged again" in line for line in lines) == 2
    assert run.ledger.query("SELECT * FROM depositions") == []


def test_a_champion_that_fails_is_deposed_and_the_one_before_it_takes_its_place(tmp_path):
    target = prepared(tmp_path, verify_every=3)
    judge, lines = Turncoat(FASTER), []
    run = loop(target, tmp_path, Script([FAST, FASTER, *failing(3), "speed = 1.3\n"]), judge, say=lines.append)
    outcome = run.run()
    said = [line for line in lines if "deposed" in line]
    fast, faster = (run.ledger.files.add(source.encode()) for source in (FAST, FASTER))
    assert said == [
        f"champion {faster[:12]} FAILED G6 when judged again and is deposed; {fast[:12]} is champion; "
        f"forgetrain ledger show {faster[:12]} tells why"
    ]
    # what comes later is raced against the one before, and elected with that ratio
    assert (outcome.folder / "engine.py").read_text() == "speed = 1.3\n"
    assert outcome.gain == pytest.approx(1.3)
    assert outcome.verified
    rows = run.ledger.query("SELECT e.candidate FROM depositions d JOIN elections e ON e.number = d.election")
    assert rows == [{"candidate": faster}]
    lost = loop(target, tmp_path, Script([])).submit(optimise.Proposal(FASTER, "again"))
    assert lost.ended == "was judged before"


def test_where_none_stands_the_aligned_engine_is_champion_and_no_folder_stays(tmp_path):
    target = prepared(tmp_path)
    first = loop(target, tmp_path, Script([FAST])).run()
    assert first.folder.is_dir()
    run = loop(target, tmp_path, Script([]), Turncoat(FAST, after=0))
    outcome = run.run()
    assert (outcome.champion, outcome.verified, outcome.folder) == (run.baseline, False, None)
    assert outcome.gain == 1.0
    assert not first.folder.exists()
    assert loop(target, tmp_path, Script([])).run().verified is None


def test_a_call_that_finds_the_budget_spent_judges_nothing_again_that_it_finds_as_it_was(tmp_path, monkeypatch):
    target = prepared(tmp_path, attempts=1)
    first, judge = loop(target, tmp_path, Script([FAST])).run(), Verdicts()
    again = loop(target, tmp_path, Script([FASTER]), judge).run()
    assert judge.seen == []
    assert (again.folder, again.verified, again.champion) == (first.folder, True, first.champion)
    assert again.ended == "1 attempts are made"
    (first.folder / "engine.py").write_text("speed = 9.9\n")
    mended = loop(target, tmp_path, Script([]), judge).run()
    assert judge.seen == [FAST]
    assert (mended.folder / "engine.py").read_text() == FAST
    plain = optimise.fingerprint
    monkeypatch.setattr(optimise, "fingerprint", lambda **options: {**plain(**options), "processor": "another"})
    loop(target, tmp_path, Script([]), judge).run()
    assert judge.seen == [FAST, FAST]


def test_a_spent_budget_spares_no_champion_of_a_part_of_the_gates_the_rest(tmp_path):
    target = prepared(tmp_path, attempts=1)
    part = loop(target, tmp_path, Script([FAST]), gates=("contract", "G7")).run()
    assert (part.folder / "engine.py").read_text() == FAST
    judge = Verdicts()
    whole = loop(target, tmp_path, Script([]), judge).run()
    assert judge.seen == [FAST]
    assert whole.verified


def test_one_slow_moment_deposes_nobody(tmp_path):
    target = prepared(tmp_path, verify_every=2)
    run = loop(target, tmp_path, Script([FAST, *failing(3)]), Turncoat(FAST, gate="G7", times=1))
    assert run.run().verified
    twice = loop(target, tmp_path, Script([]), Turncoat(FAST, gate="G7", after=0, times=2))
    assert twice.run().verified is False


def test_a_verification_that_was_cut_off_comes_again(tmp_path):
    target = prepared(tmp_path, verify_every=2)

    class CutOff(Verdicts):
        def judge(self, file, **options):
            if self.seen.count(FAST) == 2:
                raise KeyboardInterrupt
            return super().judge(file, **options)

    with pytest.raises(KeyboardInterrupt):
        loop(target, tmp_path, Script([FAST, "bad\n"]), CutOff()).run()
    judge = Verdicts()
    run = loop(target, tmp_path, Script(["bad 2\n"]), judge)
    run.run()
    assert judge.seen[0] == FAST
    assert run.ledger.query("SELECT * FROM depositions") == []


def test_a_champion_that_failed_once_and_was_cut_off_in_its_second_race_is_not_verified(tmp_path):
    loop(prepared(tmp_path, verify_every=3, attempts=2), tmp_path, Script([FAST, "bad\n"])).run()

    class CutOff(Turncoat):
        def judge(self, file, **options):
            if self.seen.count(FAST) == 1:
                raise KeyboardInterrupt
            return super().judge(file, **options)

    target = prepared(tmp_path, verify_every=3, attempts=9)
    with pytest.raises(KeyboardInterrupt):
        loop(target, tmp_path, Script(failing(5)), CutOff(FAST, gate="G7", after=0)).run()
    spent, judge, lines = prepared(tmp_path, verify_every=3, attempts=1), Verdicts(), []
    outcome = loop(spent, tmp_path, Script([]), judge).run()
    assert judge.seen == [FAST]
    assert outcome.verified
    with pytest.raises(KeyboardInterrupt):
        loop(target, tmp_path, Script(failing(5)), CutOff(FAST, gate="G7", after=0)).run()
    loop(target, tmp_path, Script([]), Verdicts(), say=lines.append).run()
    assert any(line.startswith("the champion failed when it was judged last") for line in lines)


def test_an_engine_that_was_changed_in_the_ledger_is_not_judged_in_its_place(tmp_path):
    target = prepared(tmp_path)
    run = loop(target, tmp_path, Script([FAST]))
    path = run.ledger.files.path(run.run().champion)
    path.chmod(0o644)
    path.write_text("speed = 9.9\n")
    with pytest.raises(UserError, match="was changed"):
        loop(target, tmp_path, Script([])).run()


@pytest.mark.parametrize("key", ["processor", "cores"])
def test_times_of_another_machine_are_not_compared(tmp_path, monkeypatch, key):
    target = prepared(tmp_path)
    loop(target, tmp_path, Script([FAST, "speed = 1.1\n"])).run()
    if key == "cores":
        monkeypatch.setattr(optimise.os, "sched_getaffinity", lambda _: set(range(999)))
    else:
        plain = optimise.fingerprint
        monkeypatch.setattr(optimise, "fingerprint", lambda **options: {**plain(**options), "processor": "another"})
    judge, lines, told = Verdicts(), [], {}
    run = loop(target, tmp_path, Script([FASTER]), judge, say=lines.append)
    run.catalogue.tell = lambda source, ratio, plan: told.__setitem__(source, ratio)
    outcome = run.run()
    assert told[FAST] is None
    assert "speed = 1.1\n" not in told  # who lost the race there may win it here
    assert "the champion's times are from elsewhere" in lines[0]
    assert key in lines[0]
    assert judge.seen[0] == FAST
    assert told[FASTER] == pytest.approx(1.5)
    assert outcome.gain == pytest.approx(1.5)
    once = loop(target, tmp_path, Script([]), say=lines.append)
    once.run()
    assert sum("from elsewhere" in line for line in lines) == 1
    environments = once.ledger.query("SELECT environment FROM judgings ORDER BY number")
    assert key in json.loads(environments[-1]["environment"])


def test_who_lost_the_race_on_another_machine_may_come_again(tmp_path, monkeypatch):
    target, slow, wrong = prepared(tmp_path), optimise.Proposal("speed = 1.0\n", "mine"), optimise.Proposal("bad\n", "")
    plain = optimise.fingerprint
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(optimise, "fingerprint", lambda **options: {**plain(**options), "processor": "another"})
        for proposal in (slow, wrong):
            loop(target, tmp_path, Script([])).submit(proposal)
    here = loop(target, tmp_path, Script([]))
    assert here.submit(slow).ended.startswith("rejected by G7")
    assert here.submit(slow).ended == "was judged before"
    assert here.submit(wrong).ended == "was judged before"
