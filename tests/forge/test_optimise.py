"""The loop, with a judge whose answers the tests decide: what is elected and what is kept."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from forgetrain.durable import read_json, sha256_file, write_json
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.forge.optimise import CONFIRMED, Loop
from forgetrain.forge.profile import Profile
from forgetrain.forge.proposers.base import Cost, NoProposal, Proposal
from forgetrain.forge.proposers.catalogue import Catalogue
from forgetrain.forge.standing import standing
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.ledger import Ledger
from forgetrain.judge.runner import Judgement
from tests.tiny import tiny_target


@dataclass
class Verdicts:
    """A judge: an engine with ``bad`` in its source fails G4; ``speed = X`` in it is its speed."""

    device: str = "cpu"
    sandboxed: bool = True
    seconds: float = 0.0
    seen: list[str] = field(default_factory=list)

    def judge(self, file, *, champion=None, gates=None, on_verdict, **_):
        time.sleep(self.seconds)
        source = Path(file).read_text()
        self.seen.append(source)
        ratio = speed(source) / (speed(Path(champion).read_text()) if champion else 1.0)
        detail = {"ratio": ratio, "low": ratio, "high": ratio}
        verdicts = [Verdict("G7", ratio > 1.01, ratio, 1.01, ratio - 1.01, detail=detail, sandboxed=self.sandboxed)]
        if gates is not None and "G7" not in gates:
            verdicts = []
        if gates is None or "G4" in gates:
            verdicts.insert(0, Verdict("G4", "bad" not in source, explanation="secret", sandboxed=self.sandboxed))
        done = []
        for verdict in verdicts:
            done.append(verdict)
            on_verdict(verdict)
            if not verdict.passed:
                break
        return Judgement(sha256_file(Path(file)), done, sandboxed=self.sandboxed)


def speed(source):
    return next((float(line[8:]) for line in source.splitlines() if line.startswith("speed = ")), 1.0)


@dataclass
class Script:
    """A proposer that answers with these sources, one after the other."""

    sources: list[str]
    name: str = "script"
    briefs: list = field(default_factory=list)

    def propose(self, brief):
        self.briefs.append(brief)
        if not self.sources:
            return NoProposal("nothing more", exhausted=True)
        source = self.sources.pop(0)
        return Proposal(source, f"tries {source.strip()}") if source else NoProposal("changed nothing")


def prepared(runs, **search):
    target = tiny_target(search={"minutes": 5, **search})
    folder = runs / target.name / "engine"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "engine.py").write_text(write_engine(target, Plan.textbook()))
    verdicts = [Verdict(gate, True).as_dict() for gate in ("G1", "G2", "G3")]
    write_json(folder / "verdicts.json", {"sha256": sha256_file(folder / "engine.py"), "verdicts": verdicts})
    return target


def another(target):
    """A target of the same name, whose engine is the same."""
    return target.model_copy(update={"recipe": target.recipe.model_copy(update={"lr": 5e-3})})


def loop(target, runs, proposer, judge=None, **options):
    ledger = Ledger(runs / "ledger")
    catalogue = Catalogue(target, Plan.textbook())
    return Loop(target, runs, ledger, judge or Verdicts(), proposer, catalogue, **options)


def test_what_is_faster_and_right_is_elected_and_written_with_its_provenance(tmp_path):
    target = prepared(tmp_path)
    script = Script(["speed = 1.2\n", "speed = 1.1\n", "bad\nspeed = 9\n", "speed = 1.5\n"])
    lines = []
    outcome = loop(target, tmp_path, script, say=lines.append).run()
    assert (outcome.elections, outcome.attempts, outcome.ended) == (2, 5, "nothing more")
    assert outcome.gain == pytest.approx(1.5)
    assert (outcome.folder / "engine.py").read_text() == "speed = 1.5\n"
    provenance = read_json(outcome.folder / "provenance.json", "")
    assert provenance["sha256"] == sha256_file(outcome.folder / "engine.py") == outcome.champion
    assert [line["message"] for line in provenance["lineage"]] == [
        "tries speed = 1.5",
        "tries speed = 1.2",
        "equals the reference",
    ]
    assert [line.split(": ")[2].partition(" (")[0] for line in lines[:4]] == [
        "elected, 1.200 times the champion",
        "rejected by G7, 0.917 times the champion",
        "rejected by G4",
        "elected, 1.250 times the champion",
    ]


def test_of_a_hidden_gate_a_brief_tells_pass_or_fail_alone(tmp_path):
    target = prepared(tmp_path)
    script = Script(["bad\n", "speed = 1.0\n"])
    loop(target, tmp_path, script).run()
    assert "secret" not in script.briefs[1].markdown()
    assert script.briefs[1].first_failure == "G4 failed"
    assert "G7" in script.briefs[2].first_failure


def test_a_part_without_the_race_is_decided_by_one(tmp_path):
    target, judge = prepared(tmp_path), Verdicts()
    script = Script(["speed = 0.9\n", "bad\nspeed = 9\n", "speed = 1.5\n"])
    lines = []
    part = loop(target, tmp_path, script, judge, gates=["contract", "G4"], say=lines.append)
    outcome = part.run()
    assert (outcome.elections, outcome.gain) == (1, pytest.approx(1.5))
    assert "not confirmed by G7, 0.900 times the champion" in lines[0]
    assert "rejected by G4" in lines[1]
    rows = part.ledger.query("SELECT purpose FROM judgings ORDER BY number")
    assert [row["purpose"] for row in rows] == ["aligned", "part", "confirmation", "part", "part", "confirmation"]
    provenance = read_json(outcome.folder / "provenance.json", "")
    assert [verdict["gate"] for verdict in provenance["verdicts"]] == ["G4", "G7"]


def test_what_is_replayed_races_once_and_what_is_searched_twice(tmp_path):
    target = prepared(tmp_path)
    part = loop(target, tmp_path, Script(["speed = 2\n"]), gates=["G4", "G7"])
    part.replay(Proposal("speed = 1.2\n", "ships"), ["G4"])
    part.run()
    rows = part.ledger.query(
        "SELECT group_concat(v.gate) AS gates FROM judgings j JOIN verdicts v ON v.judging = j.id "
        "WHERE j.purpose != 'aligned' GROUP BY j.number ORDER BY j.number"
    )
    assert [row["gates"] for row in rows] == ["G4", "G7", "G4,G7", "G7"]


def test_a_winner_that_takes_too_much_memory_is_told_to_nobody_as_one(tmp_path):
    class Heavy(Verdicts):
        def judge(self, file, *, on_verdict, gates=None, **options):
            judgement = super().judge(file, on_verdict=on_verdict, gates=gates, **options)
            if gates == CONFIRMED:
                judgement.verdicts.append(Verdict("G8", False, explanation="too much", sandboxed=True))
                on_verdict(judgement.verdicts[-1])
            return judgement

    target = prepared(tmp_path)
    run, told = loop(target, tmp_path, Script(["speed = 9\n"]), Heavy()), []
    run.catalogue.tell = lambda source, gain, plan: told.append(gain)
    assert run.run().elections == 0
    assert set(told) == {None}
    assert standing(run.ledger, run.key, run.environment).gains == {}


def test_nor_does_the_reason_why_a_hidden_gate_did_not_confirm(tmp_path):
    class Replayed(Verdicts):
        def judge(self, file, *, on_verdict, gates=None, **options):
            if gates != CONFIRMED:
                return super().judge(file, on_verdict=on_verdict, gates=gates, **options)
            verdict = Verdict("G7.replay", False, explanation="secret")
            on_verdict(verdict)
            return Judgement(sha256_file(Path(file)), [verdict], sandboxed=True)

    script = Script(["speed = 2\n", "bad\n"])
    loop(prepared(tmp_path), tmp_path, script, Replayed()).run()
    assert "not confirmed by G7.replay" in script.briefs[1].markdown()
    assert "secret" not in script.briefs[1].markdown()


def test_a_brief_tells_where_the_champions_time_goes(tmp_path):
    target, profiled = prepared(tmp_path), []

    def profiler(file):
        profiled.append(file.read_text()[:12])
        return Profile(0.1, {"linear": 0.07, "attention": 0.03}, 1e12, 1e12, [])

    script = Script(["speed = 1.2\n", "bad\n"])
    loop(target, tmp_path, script, profiler=profiler).run()
    assert script.briefs[0].profile == (("linear", pytest.approx(0.7)), ("attention", pytest.approx(0.3)))
    assert "- linear: 70%" in script.briefs[0].markdown()
    assert script.briefs[0].gaps == ("linear", "attention")
    again = loop(target, tmp_path, Script([]), profiler=profiler)
    assert again.profile(again.ledger.champion(again.key)["candidate"]) is not None
    assert len(profiled) == 2  # the aligned engine and the champion, each once
    assert loop(target, tmp_path, Script([])).profile("0" * 64) is None


def test_who_was_elected_by_a_part_of_the_gates_meets_them_all_before_the_next_attempt(tmp_path):
    target, judge = prepared(tmp_path), Verdicts()
    quick = loop(target, tmp_path, Script([]), judge, gates=["G4", "G7"])
    outcome = quick.replay(Proposal("speed = 1.2\n", "ships"), ["G4", "G7"])
    assert outcome is not None
    assert (outcome.elections, outcome.verified, outcome.gain) == (1, None, pytest.approx(1.2))
    assert len(judge.seen) == 2  # judged and confirmed; nobody verified it
    provenance = read_json(outcome.folder / "provenance.json", "")
    assert {verdict["gate"]: verdict["pass"] for verdict in provenance["verdicts"]} == {"G4": True, "G7": True}
    assert quick.replay(Proposal("speed = 1.2\n", "ships"), ["G4", "G7"]) is None
    lines = []
    loop(target, tmp_path, Script([]), judge, say=lines.append).run()
    assert lines[0].startswith("the champion was elected by a part of the gates: it is judged again")


def test_a_champion_that_passed_every_gate_again_before_the_first_attempt_does_not_have_to_at_the_end(tmp_path):
    target, judge = prepared(tmp_path), Verdicts()
    loop(target, tmp_path, Script([]), judge, gates=["G4", "G7"]).replay(
        Proposal("speed = 1.2\n", "ships"), ["G4", "G7"]
    )
    judge.seen.clear()
    outcome = loop(target, tmp_path, Script(["bad\n"]), judge).run()
    assert outcome.verified
    assert judge.seen == ["speed = 1.2\n", "bad\n"]
    provenance = read_json(outcome.folder / "provenance.json", "")
    assert [verdict["gate"] for verdict in provenance["verdicts"]] == ["G4", "G7"]
    outcome = loop(target, tmp_path, Script(["speed = 1.5\n"]), judge).run()
    assert judge.seen[2:] == ["speed = 1.5\n"] * 3  # judged, confirmed, and as the new champion once more
    assert outcome.verified


class Thorough(Verdicts):
    """All gates are one more than the part of them."""

    def judge(self, file, *, on_verdict, gates=None, **options):
        found = super().judge(file, on_verdict=on_verdict, gates=gates, **options)
        if gates is None and found.passed:
            found.verdicts.append(Verdict("G5", True))
            on_verdict(found.verdicts[-1])
        return found


def test_what_a_champion_passed_is_in_its_folder_before_the_next_attempt(tmp_path):
    target, ships = prepared(tmp_path), Proposal("speed = 1.2\n", "ships")
    loop(target, tmp_path, Script([]), gates=["G4", "G7"]).replay(ships, ["G4", "G7"])

    class Killed:
        name = "killed"

        def propose(self, brief):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(target, tmp_path, Killed(), Thorough()).run()
    provenance = read_json(tmp_path / target.name / "champion" / "provenance.json", "")
    assert [verdict["gate"] for verdict in provenance["verdicts"]] == ["G4", "G7", "G5"]


def test_a_champion_s_folder_tells_of_its_own_target(tmp_path):
    target, mine = prepared(tmp_path), Proposal("speed = 2\n", "mine")
    loop(target, tmp_path, Script([]), Thorough()).submit(mine)
    outcome = loop(another(target), tmp_path, Script([]), gates=["G4", "G7"]).submit(mine)
    provenance = read_json(outcome.folder / "provenance.json", "")
    assert provenance["target"]["recipe"]["lr"] == 5e-3
    assert [verdict["gate"] for verdict in provenance["verdicts"]] == ["G4", "G7"]
    # the first target's loop has nothing to attempt, and finds the folder of the other one
    restored = loop(target, tmp_path, Script([]), Thorough()).run()
    provenance = read_json(restored.folder / "provenance.json", "")
    assert provenance["target"]["recipe"]["lr"] == target.recipe.lr


@dataclass
class Together:
    """A cluster: judges as ``Verdicts`` does."""

    slots: int = 3
    rounds: list[int] = field(default_factory=list)

    def judge_all(self, candidates, champion):
        self.rounds.append(len(candidates))
        folder = Path(tempfile.mkdtemp())
        (folder / "champion.py").write_bytes(champion)
        judgements = []
        for candidate in candidates:
            (folder / "candidate.py").write_bytes(candidate)
            files = folder / "candidate.py", folder / "champion.py"
            judgements.append(Verdicts().judge(files[0], champion=files[1], on_verdict=lambda verdict: None))
        shutil.rmtree(folder)
        return judgements


def test_attempts_of_a_round_are_judged_at_once_and_must_beat_who_was_elected_meanwhile(tmp_path):
    target, cluster, lines = prepared(tmp_path), Together(), []
    script = Script(["speed = 1.5\n", "speed = 1.2\n", "bad\n", "speed = 1.5\n", "speed = 2\n"])
    outcome = loop(target, tmp_path, script, say=lines.append, cluster=cluster).run()
    assert cluster.rounds == [3, 1]  # one of the second round was judged before
    assert (outcome.attempts, outcome.elections, outcome.gain) == (6, 2, pytest.approx(2.0))
    reasons = [line.split(": ")[2].partition(" (")[0] for line in lines[:5]]
    assert reasons == [
        "elected, 1.500 times the champion",
        "not confirmed by G7, 0.800 times the champion",
        "rejected by G4",
        "nothing more",  # of the second round, before its candidates are judged
        "was judged before",
    ]
    assert lines[5].startswith("attempt 5, script: tries speed = 2: elected, 1.333 times the champion")


def test_each_request_of_a_round_is_told_what_the_ones_before_it_left(tmp_path):
    class Dear:
        """Every answer costs 900 tokens and as many dollars."""

        name = "dear"

        def __init__(self):
            self.left = []

        def propose(self, brief):
            self.left.append((brief.budget.tokens, brief.budget.attempts))
            return Proposal(f"bad {len(self.left)}\n", "m", cost=Cost(900, 0.9))

    dear, cluster = Dear(), Together(slots=4)
    target = prepared(tmp_path, tokens=2000, dollars=2.0, attempts=5)
    outcome = loop(target, tmp_path, dear, cluster=cluster).run()
    assert dear.left == [(2000, 5), (1100, 4), (200, 3)]  # then the dollars are spent
    assert cluster.rounds == [3]
    assert outcome.ended == "2 dollars are spent"


def test_what_a_round_had_cost_counts_once(tmp_path):
    target = prepared(tmp_path)
    cluster = Together()
    judge_all = cluster.judge_all
    cluster.judge_all = lambda *given: (time.sleep(0.6), judge_all(*given))[1]
    made = loop(target, tmp_path, Script(["speed = 0.5\n", "speed = 0.6\n", "speed = 0.7\n"]), cluster=cluster)
    began = time.monotonic()
    made.run()
    assert 0.6 < made.ledger.spent(made.key).seconds < time.monotonic() - began + 0.1


def test_no_attempt_begins_that_would_not_end_in_time(tmp_path):
    target = prepared(tmp_path)
    script = Script(["speed = 0.5\n", "speed = 0.6\n"])
    made = loop(target, tmp_path, script, Verdicts(seconds=0.5))
    answer = script.propose

    def propose(brief):
        made.until = time.monotonic() + 0.4  # as long as the first attempt takes, there is not
        return answer(brief)

    script.propose = propose
    outcome = made.run()
    assert (outcome.attempts, outcome.ended) == (1, "the time for searching is over")


def test_a_strangers_engine_that_no_sandbox_held_is_not_elected(tmp_path):
    target = prepared(tmp_path)
    judge = Verdicts(sandboxed=False)
    assert loop(target, tmp_path, Script(["speed = 2\n"]), judge).run().elections == 0
    again = Script(["speed = 3\n"])
    assert loop(target, tmp_path, again, judge, allow_unsandboxed=True).run().elections == 1


def test_an_engine_that_was_not_elected_for_want_of_a_sandbox_alone_may_come_again(tmp_path):
    target, judge, mine = prepared(tmp_path), Verdicts(sandboxed=False), Proposal("speed = 2\n", "mine")
    refused = loop(target, tmp_path, Script([]), judge).submit(mine)
    assert "--allow-unsandboxed" in refused.ended
    assert loop(target, tmp_path, Script([]), judge, allow_unsandboxed=True).submit(mine).elections == 1
    again = loop(target, tmp_path, Script([]), judge, allow_unsandboxed=True).submit(mine)
    assert again.ended == "was judged before"


def test_so_may_one_whose_judging_was_cut_off_when_it_came_again(tmp_path):
    target, mine = prepared(tmp_path), Proposal("speed = 2\n", "mine")
    loop(target, tmp_path, Script([]), Verdicts(sandboxed=False)).submit(mine)

    class CutOff(Verdicts):
        def judge(self, file, **options):
            if self.seen:  # in the confirmation
                raise KeyboardInterrupt
            return super().judge(file, **options)

    with pytest.raises(KeyboardInterrupt):
        loop(target, tmp_path, Script([]), CutOff()).submit(mine)
    assert loop(target, tmp_path, Script([])).submit(mine).elections == 1


def test_budgets_survive_and_nothing_is_judged_twice(tmp_path):
    target = prepared(tmp_path, attempts=2)
    judge = Verdicts()
    first = loop(target, tmp_path, Script(["bad 1\n", "bad 2\n", "bad 3\n"]), judge).run()
    assert first.ended == "2 attempts are made"
    assert loop(target, tmp_path, Script(["bad 4\n"]), judge).run().attempts == 2
    larger = prepared(tmp_path, attempts=4)
    outcome = loop(larger, tmp_path, Script(["bad 1\n", "bad 5\n"]), judge).run()
    assert outcome.attempts == 4
    assert judge.seen.count("bad 1\n") == 1


def test_a_loop_that_goes_on_gives_the_catalogue_its_plans_back(tmp_path):
    target = prepared(tmp_path, attempts=3)
    first = loop(target, tmp_path, Script([]))
    first.proposer = first.catalogue
    first.run()
    again, told = loop(target, tmp_path, Script([])), []
    again.catalogue.tell = lambda source, ratio, plan: told.append((ratio, plan))
    again.run()
    assert sum(plan is not None and plan["schedule"] == "production" for _, plan in told) == 3


def test_a_candidate_whose_judging_was_cut_off_is_judged_again(tmp_path):
    target = prepared(tmp_path)

    class CutOff(Verdicts):
        def judge(self, file, **options):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop(target, tmp_path, Script(["speed = 2\n"]), CutOff()).run()
    lines = []
    outcome = loop(target, tmp_path, Script(["speed = 2\n"]), say=lines.append).run()
    assert lines[0].endswith("had been cut off; it counts")
    assert (outcome.elections, outcome.attempts) == (1, 3)


def test_twenty_failures_stop_it_and_after_ten_the_catalogue_is_asked(tmp_path):
    target = prepared(tmp_path)
    script = Script([f"bad {number}\n" for number in range(40)])
    outcome = loop(target, tmp_path, script).run()
    assert outcome.ended.startswith("stuck")
    assert len(script.briefs) == 10
    assert outcome.attempts == 20
    assert any("ended the same way" in note for note in script.briefs[3].notes)


def test_after_it_was_stuck_another_call_asks_its_proposer(tmp_path):
    target = prepared(tmp_path)
    loop(target, tmp_path, Script([f"bad {number}\n" for number in range(40)])).run()
    script = Script(["speed = 2\n"])
    outcome = loop(target, tmp_path, script).run()
    assert (outcome.elections, outcome.ended) == (1, "nothing more")
    assert "attempts in a row were not elected" in script.briefs[0].markdown()


def test_what_others_submitted_does_not_count_against_a_call(tmp_path):
    target = prepared(tmp_path)
    submits = loop(target, tmp_path, Script([]))
    for number in range(20):
        submits.submit(Proposal(f"bad {number}\n", "mine"))
    assert loop(target, tmp_path, Script(["speed = 2\n"])).run().elections == 1


def test_races_that_are_lost_again_and_again_are_named(tmp_path):
    script = Script([f"speed = 0.9{number}\n" for number in range(4)])
    loop(prepared(tmp_path), tmp_path, script).run()
    assert "ended the same way: rejected by G7" in script.briefs[3].markdown()


def test_what_is_submitted_goes_the_same_way(tmp_path):
    target = prepared(tmp_path, attempts=1)
    assert loop(target, tmp_path, Script([])).submit(Proposal("bad\n", "mine")).ended == "rejected by G4"
    outcome = loop(target, tmp_path, Script([])).submit(Proposal("speed = 2\n", "mine"))
    assert outcome.ended == "elected, 2.000 times the champion"
    assert (outcome.folder / "engine.py").read_text() == "speed = 2\n"
    again = loop(target, tmp_path, Script([])).submit(Proposal("speed = 2\n", "mine"))
    assert again.ended == "was judged before"


def test_two_loops_on_one_target_are_one_too_many(tmp_path):
    target = prepared(tmp_path)
    first, second = loop(target, tmp_path, Script([])), loop(target, tmp_path, Script([]))
    with first.ledger.claim(target.name), pytest.raises(UserError, match="another process"):
        second.run()
