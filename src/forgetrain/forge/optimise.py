"""The loop: a proposer writes a candidate, the judge judges it, the ledger keeps it, a confirmed one is elected.

    with Ledger(runs / "ledger") as ledger, Judge(target, data=data) as judge:
        loop = Loop(target, runs, ledger, judge, catalogue, catalogue)
        outcome = loop.run()
        outcome.champion, outcome.gain

Everything that the loop knows is in the ledger, so a loop that was killed goes on where it was: an attempt that was cut
off counts with what it had cost, and no candidate is judged twice. One loop works on a target at a time.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forgetrain.forge.adopt import adopt_aligned
from forgetrain.forge.briefing import plan_behind, write_brief
from forgetrain.forge.history import budget_left, champion_before, elections, judged, outcomes
from forgetrain.forge.outcome import Champion, Judged, LoopOutcome
from forgetrain.forge.profile import Profile, read_profile
from forgetrain.forge.proposers.base import Brief, Budget, NoProposal, Proposal, Proposer
from forgetrain.forge.proposers.catalogue import Catalogue
from forgetrain.forge.provenance import holds, write_champion
from forgetrain.forge.refs import keep_commit
from forgetrain.forge.spending import spending
from forgetrain.forge.standing import attempts_since_verification, lost_by, moved, passed_all_gates, standing
from forgetrain.forge.stuck import Rung, rung
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.cluster import Cluster
from forgetrain.judge.ledger import Ledger
from forgetrain.judge.runner import Judge, Judgement
from forgetrain.numerics.determinism import fingerprint
from forgetrain.spec.target import Target

#: Of hidden gates a proposer sees pass or fail alone.
OPEN_GATES = ("contract", "G1", "G7", "G8")
#: What decides an election afresh, after all the gates or a part of them.
CONFIRMED = ("G7", "G8")


class Loop:
    """``aligned``: the run's aligned engine, from which everything begins. ``proposer`` writes candidates;
    ``catalogue`` takes over when it is stuck, and may be the same object.

    Args:
        say: gets one line for each attempt.
        allow_unsandboxed: elect candidates of strangers where there is no sandbox.
        profiler: profiles a champion's file, once in each environment; without one no brief tells where time goes.
        cluster: judges several candidates at once, by every gate; confirmations and verifications stay with ``judge``.
        gates: instead of all of them. Who is elected by a part of the gates goes through all before the next loop
            without this argument begins an attempt.

    ``until`` may be set to a ``time.monotonic()``: no attempt begins that would not have ended by then, if it took as
    long as the longest before it.
    """

    def __init__(
        self,
        target: Target,
        runs: Path,
        ledger: Ledger,
        judge: Judge,
        proposer: Proposer,
        catalogue: Catalogue,
        *,
        say: Callable[[str], None] = lambda line: None,
        allow_unsandboxed: bool = False,
        profiler: Callable[[Path], Profile] | None = None,
        gates: Sequence[str] | None = None,
        cluster: Cluster | None = None,
    ):
        self.target, self.runs, self.ledger, self.judge = target, runs, ledger, judge
        self.proposer, self.catalogue, self.say = proposer, catalogue, say
        self.allow_unsandboxed, self.profiler = allow_unsandboxed, profiler
        self.gates, self.cluster = gates, cluster
        self.until: float | None = None
        self.key = ledger.add_target(target)
        # speed, unlike bits, depends on the cores beside those that the threads use
        self.environment = {
            **fingerprint(device=judge.device, threads=target.hardware.threads),
            "cores": len(os.sched_getaffinity(0)),
        }
        self.first_failure: str | None = None
        self._attempt_began: tuple[str, float] | None = None
        self._before = 0  # attempts before this call
        self._longest = 0.0  # seconds of an attempt
        self._speed: dict[str, Any] = {}  # of the last race
        self._verified_champions: dict[str, Judgement] = {}  # by this loop

    def run(self) -> LoopOutcome:
        """Until the budget is spent, the proposer has nothing more, or the ladder says stop.

        Raises:
            UserError: another loop works on this target, or the reference failed.
        """
        with self.claimed():
            self._remember()
            self._before, ended = len(self._outcomes()), None
            while ended is None:
                ended = self._attempt()
            self._attempt_began = None
            return self._standing(ended) if len(self._outcomes()) == self._before else self._verified(ended)

    def submit(self, proposal: Proposal, name: str = "submit") -> LoopOutcome:
        """One candidate that a person or an agent brings, through the same gates; it counts as an attempt, but no
        budget refuses it. ``ended`` says what became of it.

        Raises:
            UserError: a loop works on this target, or the reference failed.
        """
        with self.claimed():
            id, began = self._begin(name)
            elected, reason = self._conclude(id, began, proposal, self.champion(), name)
            return self._verified(reason) if elected == "accepted" else self._outcome(reason)

    def replay(self, proposal: Proposal, gates: Sequence[str] | None) -> LoopOutcome | None:
        """A candidate of the catalogue's kind, as ``submit``, through ``gates`` and the race that decides; None when it
        was judged before."""
        with self.claimed():
            known = hashlib.sha256(proposal.source.encode()).hexdigest() in self._judged()
        own, self.gates = self.gates, gates
        try:
            return None if known else self.submit(proposal, self.catalogue.name)
        finally:
            self.gates = own

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The target, for this loop alone, with a champion."""
        with self.ledger.claim(self.target.name):
            for id in self.ledger.end_interrupted(self.key):
                self.say(f"attempt {id[:8]} had been cut off; it counts")
            self.ledger.files.sweep()
            self._adopt_aligned()
            yield

    # What the ledger knows.

    def champion(self) -> Champion:
        """To be asked where the target is claimed."""
        row = self.ledger.champion(self.key)
        assert row is not None
        gain = standing(self.ledger, self.key, self.environment).champion
        return Champion(row["candidate"], self._source(row["candidate"]), gain or 1.0)

    def _source(self, digest: str) -> str:
        return self.ledger.files.read(digest).decode()

    def _outcomes(self) -> list[dict[str, Any]]:
        return outcomes(self.ledger, self.key)

    def _adopt_aligned(self) -> None:
        self.baseline = adopt_aligned(self.ledger, self.key, self.runs / self.target.name, self.environment)

    def _remember(self) -> None:
        """Tells the catalogue what the ledger knows, so that it proposes nothing twice and builds on what helped."""
        gains = standing(self.ledger, self.key, self.environment).gains
        rows = self.ledger.query("SELECT candidate FROM elections WHERE target = ?", (self.key,))
        elected = {row["candidate"] for row in rows}
        for digest in sorted(self._judged()):
            gain = gains.get(digest)
            # one that was elected in another environment is no failure, only its speed here is not known
            plan = None if gain is None and digest in elected else plan_behind(self.ledger, digest, self.key)
            self.catalogue.tell(self._source(digest), gain, plan)

    def _judged(self) -> set[str]:
        return {self.baseline, *judged(self.ledger, self.key, self.environment)}

    def _budget(self) -> Budget:
        return budget_left(self.ledger, self.key, self.target.search)

    # One attempt.

    def _spent(self) -> str | None:
        """Which part of the budget is spent, or None."""
        budget = self._budget()
        if budget.minutes <= 0:
            return f"{self.target.search.minutes:g} minutes are spent"
        if budget.attempts <= 0:
            return f"{self.target.search.attempts} attempts are made"
        if self.target.search.dollars > 0 and budget.dollars <= 0:
            return f"{self.target.search.dollars:g} dollars are spent"
        return None

    def _attempt(self) -> str | None:
        """One attempt; why the loop ends, or None to go on."""
        if (spent := self._spent()) is not None:
            return spent
        if self.until is not None and time.monotonic() + self._longest > self.until:
            return "the time for searching is over"
        history = self._outcomes()
        step = rung(history, self._before)
        if step.stop:
            made = len(history) - self._before
            return f"stuck: {made} attempts in this call, none elected since long; last: {history[-1]['reason']}"
        proposer = self.catalogue if step.catalogue else self.proposer
        if self.cluster is not None:
            return self._round(self.cluster, proposer, step)
        asked = self._ask(proposer, step)
        if isinstance(asked, NoProposal):
            return asked.reason if asked.exhausted else None
        self._conclude(*asked, proposer.name)
        return None

    def _ask(self, proposer: Proposer, step: Rung) -> tuple[str, float, Proposal, Champion] | NoProposal:
        """Begins an attempt: its id, when it began, what was proposed and from which parent; or an attempt that has
        ended with nothing."""
        budget = self._budget()  # this attempt is still in it
        id, began = self._begin(proposer.name)
        history, champion = self._outcomes(), self.champion()
        parent = self._other_parent(champion) if step.other_parent else champion
        before = [row for row in history if row["id"] != id]
        brief = self._brief(parent, budget, before, step.notes)
        with spending(self.ledger, id, began):
            answer = proposer.propose(brief)
        self.ledger.spend(id, tokens=answer.cost.tokens, dollars=answer.cost.dollars)
        if isinstance(answer, NoProposal):
            self.ledger.end_attempt(id, "failed", reason=answer.reason, seconds=time.monotonic() - began)
            self.say(f"attempt {len(history)}, {proposer.name}: nothing: {answer.reason}")
            return answer
        return id, began, answer, parent

    def _round(self, cluster: Cluster, proposer: Proposer, step: Rung) -> str | None:
        """Several attempts whose candidates are judged at once, against the champion of now. They end in the order in
        which they were proposed; one that is elected is whom the next ones must beat when they are confirmed."""
        asked: list[tuple[str, float, Proposal, Champion]] = []
        ended = None
        for _ in range(cluster.slots):
            if self._spent() is not None:  # by the ones before it
                break
            answer = self._ask(proposer, step)
            if isinstance(answer, NoProposal):
                ended = answer.reason if answer.exhausted else None
                break
            asked.append(answer)
        champion = self.champion()
        fresh: dict[str, str] = {}  # source → judging
        for id, _, proposal, parent in asked:
            digest = self._enter(id, proposal, parent, proposer.name)
            if proposal.source not in fresh and digest not in self._judged():
                fresh[proposal.source] = self._begin_judging(digest, "gates")
        judgements = cluster.judge_all([source.encode() for source in fresh], champion.source.encode())
        found = dict(zip(fresh, judgements, strict=True))
        for source, judgement in found.items():
            self.ledger.add_verdicts(fresh[source], judgement.verdicts)
            self._end_judging(fresh[source], judgement)
        for id, began, proposal, parent in asked:
            judgement = found.pop(proposal.source, None)
            judged = None if judgement is None else Judged(judgement, champion.gain, len(asked))
            self._conclude(id, began, proposal, parent, proposer.name, judged)
        return ended

    def _begin(self, name: str) -> tuple[str, float]:
        """Counts an attempt; returns its id and when it began. A champion whose turn it is is judged again first, at
        this attempt's cost."""
        due = self._due()
        id, began = self.ledger.begin_attempt(self.key, proposer=name), time.monotonic()
        self._attempt_began = id, began
        if due is not None:
            self.say(f"{due}: it is judged again, against the aligned engine")
            if (passed := self._verify_champion(f"verification-{id}")) is not None:
                self._write(passed.speed, passed.told())  # before the attempt, lest a kill lose it
        return id, began

    def _due(self) -> str | None:
        """Why the champion has to be judged again now, or None."""
        row = self.ledger.champion(self.key)
        if row is None or row["candidate"] == self.baseline:
            return None
        if (doubt := self._doubt(row["candidate"])) is not None:
            return doubt
        count = attempts_since_verification(self.ledger, self.key)
        return f"{count} attempts since the champion was verified" if count >= self.target.search.verify_every else None

    def _doubt(self, champion: str) -> str | None:
        """Why what the ledger has of a champion is not enough here, or None."""
        passed = passed_all_gates(self.ledger, self.key, champion)
        if self.gates is None and not passed:
            # who fails is deposed, unless the loop was killed before its second race
            failed = "failed when it was judged last, and nothing came of it"
            return f"the champion {'was elected by a part of the gates' if passed is None else failed}"
        change = moved(self.ledger, self.key, champion, self.environment)
        return change and f"the champion's times are from elsewhere ({change}) and count no more"

    def _conclude(
        self,
        id: str,
        began: float,
        proposal: Proposal,
        parent: Champion,
        name: str,
        judged: Judged | None = None,
    ) -> tuple[str, str]:
        """Judges what was proposed, unless it was, and ends the attempt; returns its outcome and why."""
        champion = self.champion()
        outcome, reason, ratio = self._judge(id, proposal, parent, champion, name, judged)
        against = champion.gain if judged is None or outcome == "accepted" else judged.gain
        seconds = (time.monotonic() - began) / (1 if judged is None else judged.together)
        self._longest = max(self._longest, seconds)
        self.ledger.end_attempt(id, outcome, reason=reason, seconds=seconds)
        self.catalogue.tell(proposal.source, None if ratio is None else ratio * against, proposal.plan)
        number = [row["id"] for row in self._outcomes()].index(id) + 1
        self.say(f"attempt {number}, {name}: {proposal.message}: {reason} ({seconds:.0f} s)")
        return outcome, reason

    def _other_parent(self, champion: Champion) -> Champion:
        digest = champion_before(self.ledger, self.key, champion.digest)
        return champion if digest is None else Champion(digest, self._source(digest), 1.0)

    def brief(self) -> Brief:
        """What a proposer would be told now."""
        with self.claimed():
            history = self._outcomes()
            return self._brief(self.champion(), self._budget(), history, rung(history).notes)

    def _brief(self, parent: Champion, budget: Budget, history: list[dict[str, Any]], notes: tuple[str, ...]) -> Brief:
        plan, profile = plan_behind(self.ledger, parent.digest, self.key), self.profile(parent.digest)
        return write_brief(self.target, parent, plan, budget, history, notes, profile, self.first_failure)

    def profile(self, digest: str) -> Profile | None:
        """Where a candidate's time goes in this environment, measured once; None without a profiler."""
        kept = self.ledger.profile(self.key, digest, self.environment)
        if kept is not None:
            return read_profile(kept)
        if self.profiler is None:
            return None
        profile = self.profiler(self.ledger.files.path(digest))
        self.ledger.add_profile(self.key, digest, environment=self.environment, profile=profile.as_dict())
        return profile

    def _enter(self, id: str, proposal: Proposal, parent: Champion, name: str) -> str:
        """Keeps what was proposed; returns its digest."""
        lines = difflib.unified_diff(parent.source.splitlines(True), proposal.source.splitlines(True), "parent", "new")
        digest = self.ledger.add_candidate(
            self.key,
            proposal.source.encode(),
            proposer=name,
            message=proposal.message,
            parent=parent.digest,
            diff="".join(lines),
            attempt=id,
            files={} if proposal.plan is None else {"plan.toml": proposal.plan.toml().encode()},
        )
        keep_commit(self.runs, self.target.name, digest, proposal.source, proposal.message, parent.digest)
        return digest

    def _judge(
        self, id: str, proposal: Proposal, parent: Champion, champion: Champion, name: str, judged: Judged | None
    ) -> tuple[str, str, float | None]:
        """(outcome, reason, ratio): through the gates, then a fresh confirmation that decides the election."""
        digest = self._enter(id, proposal, parent, name)
        if judged is not None:
            judgement = judged.judgement
        else:
            if digest in self._judged():
                return "rejected", "was judged before", None
            purpose = "gates" if self.gates is None else "part"
            judgement, _ = self._through_gates(digest, champion, purpose, self.gates)
        failed = judgement.first_failure()
        if failed is not None:
            seen = failed.gate in OPEN_GATES
            self.first_failure = f"{failed.gate}: {failed.explanation}" if seen else f"{failed.gate} failed"
            ratio, words = lost_by(failed)
            return "rejected", f"rejected by {failed.gate}{words}", ratio
        trusted = name == self.catalogue.name
        if not (judgement.sandboxed or trusted or self.allow_unsandboxed):
            return "rejected", "unsandboxed, so not elected; see --allow-unsandboxed", None
        confirmed, judging = self._through_gates(digest, champion, "confirmation", CONFIRMED)
        failed = confirmed.first_failure()
        if failed is not None:  # it may be slower now, or broken, or refused as impossible: its verdict says which
            ratio, words = lost_by(failed)
            words = words or (f": {failed.explanation}" if failed.gate in OPEN_GATES else "")
            return "rejected", f"not confirmed by {failed.gate}{words}", ratio
        detail = next(verdict.detail for verdict in confirmed.verdicts if verdict.gate == "G7")
        self.ledger.elect(judging, ratio=detail["ratio"], low=detail["low"], high=detail["high"])
        self.first_failure = None
        return "accepted", f"elected, {detail['ratio']:.3f} times the champion", detail["ratio"]

    def _through_gates(
        self, digest: str, against: Champion | None, purpose: str, gates: Sequence[str] | None, id: str | None = None
    ) -> tuple[Judgement, str]:
        judging = self._begin_judging(digest, purpose, id)

        def keep(verdict: Verdict) -> None:
            self.ledger.add_verdicts(judging, [verdict])
            if self._attempt_began is not None:  # what was spent until a kill counts
                attempt, began = self._attempt_began
                self.ledger.spend(attempt, seconds=time.monotonic() - began)

        judgement = self.judge.judge(
            self.ledger.files.path(digest),
            champion=None if against is None else self.ledger.files.path(against.digest),
            gates=gates,
            on_verdict=keep,
        )
        self._end_judging(judging, judgement)
        return judgement, judging

    def _begin_judging(self, digest: str, purpose: str, id: str | None = None) -> str:
        return self.ledger.begin_judging(self.key, digest, environment=self.environment, purpose=purpose, id=id)

    def _end_judging(self, judging: str, judgement: Judgement) -> None:
        self._speed = judgement.speed or self._speed
        self.ledger.add_samples(judging, judgement.samples)
        self.ledger.end_judging(judging, passed=judgement.passed, sandboxed=judgement.sandboxed)

    # The end.

    def _outcome(self, ended: str) -> LoopOutcome:
        champion = self.champion()
        attempts, elected = len(self._outcomes()), elections(self.ledger, self.key)
        return LoopOutcome(champion.digest, champion.gain, attempts, elected, ended)

    def _verified(self, ended: str) -> LoopOutcome:
        """The outcome with a champion that passed every gate again in this loop, written out; or with none."""
        if self.ledger.champion(self.key)["candidate"] == self.baseline:  # type: ignore[index]
            return self._outcome(ended)
        if self.gates is not None:
            return self._provisional(ended)
        judgement = self._verified_champions.get(self.champion().digest) or self._verify_champion()
        outcome = self._outcome(ended)
        outcome.verified = judgement is not None
        if judgement is not None:
            outcome.verification = {"passed": True, "speed": judgement.speed, "verdicts": judgement.told()}
            outcome.folder = self._write(judgement.speed, judgement.told())
        return outcome

    def _standing(self, ended: str) -> LoopOutcome:
        """The same where nothing was attempted: a champion that lies there as it passed every gate again, on this
        machine, does not have to once more."""
        champion, folder = self.champion().digest, self.runs / self.target.name / "champion"
        if self.gates is not None or not holds(folder, champion, self.key) or self._doubt(champion):
            return self._verified(ended)
        outcome = self._outcome(ended)
        outcome.folder, outcome.verified = folder, True
        return outcome

    def _provisional(self, ended: str) -> LoopOutcome:
        """The outcome with the champion as a part of the gates elected it, written out unless it lies there."""
        outcome, folder = self._outcome(ended), self.runs / self.target.name / "champion"
        outcome.folder = folder
        if not holds(folder, outcome.champion, self.key):
            told = self.ledger.verdicts(outcome.champion, self.key)
            latest = {verdict["gate"]: verdict for verdict in told if verdict["purpose"] != "hand"}
            verdicts = [{**verdict, "pass": bool(verdict["pass"])} for verdict in latest.values()]
            outcome.verification = {"speed": self._speed, "verdicts": verdicts}
            self._write(self._speed, verdicts)
        return outcome

    def _verify_champion(self, id: str | None = None) -> Judgement | None:
        """Every gate again on the champion, raced against the aligned engine: the gain in one run. One that fails is
        deposed, and the champion before it has its turn; None when only the aligned engine is left.

        ``id``: of the first judging."""
        baseline = Champion(self.baseline, self._source(self.baseline), 1.0)
        while (champion := self.champion()).digest != self.baseline:
            judgement, judging = self._through_gates(champion.digest, baseline, "verification", None, id)
            failed = judgement.first_failure()
            if failed is not None and failed.gate == "G7":  # one slow moment of the machine deposes nobody
                judgement, judging = self._through_gates(champion.digest, baseline, "verification", None)
                failed = judgement.first_failure()
            if failed is None:
                gain = self.champion().gain
                self.say(f"the champion passed every gate again; {gain:.3f} times the aligned engine")
                self._verified_champions[champion.digest] = judgement
                return judgement
            self._verified_champions.pop(champion.digest, None)
            self._depose(champion.digest, judging, failed)
            id = None
        return None

    def _write(self, speed: Mapping[str, Any], verdicts: list[dict[str, Any]]) -> Path:
        standing = self.champion()
        run, champion = self.runs / self.target.name, self.ledger.candidate(standing.digest, self.key)
        speed = {**speed, "ratio_to_aligned": standing.gain}
        return write_champion(run, self.target, self.ledger, champion, self.environment, verdicts, speed)

    def _depose(self, digest: str, judging: str, failed: Verdict) -> None:
        """The election is taken back, and so is the folder that was written for it; the ledger keeps the engine."""
        self.ledger.depose(judging)
        folder = self.runs / self.target.name / "champion"
        if holds(folder, digest, self.key):
            shutil.rmtree(folder)
        self._adopt_aligned()  # what stands now may be an aligned engine of before
        before = self.champion().digest
        whom = "the aligned engine" if before == self.baseline else before[:12]
        self.say(
            f"champion {digest[:12]} FAILED {failed.gate} when judged again and is deposed; {whom} is champion; "
            f"forgetrain ledger show {digest[:12]} tells why"
        )
