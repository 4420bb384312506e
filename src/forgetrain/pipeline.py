"""The main job: reference, golden record, bitwise engine, data, training, export and a reply, one after the other.

    outcome = run_target(load_target("targets/nano-cpu.toml"), Path("runs"), Quiet())
    outcome.passed, [proof.what for proof in outcome.proofs]

Every stage leaves its work in ``runs/<target>``, and a second run takes what still fits: the golden record of the same
environment, the engine aligned with that record, data of the same sources, checkpoints of the same engine. What was
proved is in ``runs/<target>/run.json``.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from forgetrain.data.build import build_data
from forgetrain.data.folder import open_data
from forgetrain.data.loader import Loader
from forgetrain.durable import read_json, read_object, sha256_file, write_json
from forgetrain.engine.contract import weight_hash
from forgetrain.engine.plan import Plan
from forgetrain.engine.process import EngineProcess
from forgetrain.engine.write import write_engine
from forgetrain.forge.align import ORIGIN, align, alignable, origin
from forgetrain.forge.begin import open_loop
from forgetrain.forge.collect import ReferenceRejected, open_or_collect, start_reference
from forgetrain.forge.proposers.base import Proposal
from forgetrain.golden.record import MANIFEST
from forgetrain.judge.ledger import target_key
from forgetrain.judge.runner import Effort
from forgetrain.numerics.init import initial_weights
from forgetrain.ops.native import gcc
from forgetrain.publish.generate import generate
from forgetrain.publish.hf import export_hf
from forgetrain.publish.parity import TOLERANCE, logits_parity
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.target import Target, parse_target
from forgetrain.train import checkpoint
from forgetrain.train.loop import train
from forgetrain.train.metrics import read_journal
from forgetrain.train.verified import find_verdicts

#: Stage → what it does, in the words that a person reads while it runs.
STAGES = {
    "collect": "run the reference, judge it, keep what it did",
    "align": "build an engine that equals it bit for bit",
    "data": "turn text into tokens",
    "forge": "judge the engine that was elected before, search on for a while",
    "train": "train the model with the fastest engine",
    "compare": "let the reference take the same first steps",
    "export": "write the model for Hugging Face, check its logits",
    "generate": "ask the model to go on with a text",
}

PROMPT = "import os\n\n\ndef "
#: Steps of training that the reference repeats on the same batches; each takes it seconds on a CPU.
COMPARED = 5


#: Seconds for searching, at most.
SEARCH = 60.0
#: Seconds in which the whole run should end, of which searching gets what the other stages leave.
WHOLE = 300.0
#: Seconds of exporting, generating and comparing, and of a step of training beside the engine's own time.
_REST, _BESIDE = 25.0, 0.02
#: What is judged again here; the long trainings of G5 and G6 are forge's and verify's.
QUICK_GATES = ("contract", "G4.update", "G4", "G7", "G8")
#: The same of one engine that the search did not choose, whom the race that decides tells nothing twice.
REPLAYED = ("contract", "G4.update", "G4")
QUICK_EFFORT = Effort(pairs=6, steps=2, keep=True)


@dataclass(frozen=True)
class Proof:
    what: str
    passed: bool
    evidence: str


@dataclass
class Outcome:
    """stages: seconds of each; places: what lies where; stopped: the stage after which a failure ended the run."""

    target: Target
    folder: Path
    proofs: list[Proof] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    findings: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None

    @property
    def passed(self) -> bool:
        return self.stopped is None and all(proof.passed for proof in self.proofs)

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target.name,
            "passed": self.passed,
            "stopped": self.stopped,
            "proofs": [asdict(proof) for proof in self.proofs],
            "stages": self.stages,
            "places": self.places,
            **self.findings,
        }


class Watcher(Protocol):
    """Shows a run. ``stage`` surrounds a stage and yields what takes its progress: a text and a share from 0 to 1."""

    console: Console

    def stage(self, name: str) -> AbstractContextManager[Progress]: ...

    def say(self, line: str) -> None: ...


class Progress(Protocol):
    def __call__(self, what: str, share: float) -> None: ...

    def own_display(self) -> None:
        """The stage shows itself from now on."""
        ...


class Stopped(Exception):
    """A stage's finding makes the next ones pointless; the proof that failed is already in the outcome."""


def run_target(
    target: Target,
    runs: Path,
    watcher: Watcher,
    *,
    prompt: str = PROMPT,
    restart: bool = False,
    search: float = SEARCH,
) -> Outcome:
    """Runs every stage and returns what was proved; a failed gate ends the run early, with the outcome.

    restart: take nothing from earlier runs. search: seconds, at most, in which to look for a faster engine than the one
    that ships; 0 leaves the stage out, and the aligned engine trains.

    Raises:
        UserError: bad input, or a disk that is full.
        EngineFailure: the reference's process broke.
    """
    alignable(target)
    job = _Job(target, runs / target.name, runs, watcher, restart, search)
    outcome = job.run([name for name in STAGES if search > 0 or name != "forge"], prompt)
    write_json(job.folder / "run.json", outcome.as_dict())
    return outcome


def prepare(target: Target, runs: Path, watcher: Watcher) -> Outcome:
    """What optimising begins from: the golden record, the aligned engine, and the data, made where missing."""
    alignable(target)
    return _Job(target, runs / target.name, runs, watcher, restart=False).run(("collect", "align", "data"), "")


@dataclass
class _Job:
    target: Target
    folder: Path
    runs: Path
    watcher: Watcher
    restart: bool
    search: float = 0.0
    outcome: Outcome = field(init=False)
    champion: Path | None = None  # an engine that is faster than the aligned one

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def run(self, stages: Iterable[str], prompt: str) -> Outcome:
        """The stages in their order; ends after one that makes the next pointless."""
        self.outcome = outcome = Outcome(self.target, self.folder)
        for name in stages:
            began = time.monotonic()
            try:
                with self.watcher.stage(name) as progress:
                    if name == "generate":
                        self.generate(prompt, progress)
                    else:
                        getattr(self, name)(progress)
            except Stopped:
                outcome.stopped = name
            outcome.stages[name] = round(time.monotonic() - began, 2)
            if outcome.stopped:
                break
        return outcome

    def prove(self, what: str, passed: bool, evidence: str) -> None:
        self.outcome.proofs.append(Proof(what, passed, evidence))

    def collect(self, progress: Progress) -> None:
        folder = self.folder / "golden"
        if self.restart and folder.exists():
            _remove(folder)
        try:
            self.record = open_or_collect(self.target, folder, progress, self.watcher.say)
        except ReferenceRejected as rejected:
            self._verdict(rejected.verdict.as_dict())
            raise Stopped from None
        for verdict in self.record.manifest["verdicts"]:
            self._verdict(verdict)
        self.outcome.places["golden record"] = str(folder)
        self.outcome.findings["reference"] = self.record.manifest["reference"]
        self.outcome.findings["environment"] = self.record.manifest["environment"]

    def _verdict(self, verdict: dict[str, Any]) -> None:
        name = self.target.reference.name
        meaning = {
            "G0": f"{name} repeats itself and computes what the formulas say",
            "G1": f"the engine equals {name} in every tap of a step",
            "G2": "on batches drawn after it was frozen, step by step",
            "G3": "on two ranks, and after a restart",
        }
        gate = verdict["gate"]
        self.prove(f"{gate}: {meaning.get(gate, gate)}", verdict["pass"], verdict["explanation"])

    def align(self, progress: Progress) -> None:
        folder = self.folder / "engine"
        engine, known = folder / "engine.py", folder / ORIGIN
        fits = known.is_file() and read_json(known, "align again") == origin(self.target, self.record)
        if not self.restart and engine.is_file() and fits:
            verdicts = find_verdicts(engine, [])
            if verdicts and all(verdict["pass"] for verdict in verdicts):
                self.watcher.say("the engine is aligned with this record already")
                self._aligned(engine, verdicts)
                return
        result = align(self.target, folder, self.record, report=progress, say=self.watcher.say)
        self.outcome.findings["align"] = result.as_dict()
        if not result.passed or result.engine is None:
            for verdict in result.verdicts:
                self._verdict(verdict.as_dict())
            if not result.verdicts:
                where = result.broken or (str(result.divergence) if result.divergence else "no engine was written")
                self.prove(f"the engine equals {self.target.reference.name} bit for bit", False, where)
            raise Stopped
        self._aligned(result.engine, [verdict.as_dict() for verdict in result.verdicts])

    def _aligned(self, engine: Path, verdicts: list[dict[str, Any]]) -> None:
        for verdict in verdicts:
            self._verdict(verdict)
        self.outcome.places["engine, one readable file"] = str(engine)
        self.outcome.findings["verdicts"] = verdicts

    def data(self, progress: Progress) -> None:
        def report(what: str, done: int, total: int) -> None:
            progress(what, done / max(total, 1))

        folder = self.folder / "data"
        data = build_data(self.target, folder, force=self.restart, report=report)
        tokens = sum(entry["tokens"] for entry in data.manifest["sources"])
        documents = sum(entry["documents"] for entry in data.manifest["sources"])
        self.watcher.say(f"{tokens:,} tokens of {documents:,} documents")
        self.outcome.places["tokens and tokenizer"] = str(folder)
        self.outcome.findings["data"] = data.manifest

    def forge(self, progress: Progress) -> None:
        """The elected engine that ships is judged on this machine; what time is left goes into a search from there."""
        progress.own_display()
        try:
            gcc()
        except FileNotFoundError:
            self.watcher.say("no GCC, which fast engines need: the aligned engine trains; apt install g++")
            return
        aligned, shipped = self.folder / "engine" / "engine.py", _shipped(self.target)
        options: dict[str, Any] = {"gates": QUICK_GATES, "effort": QUICK_EFFORT}
        with open_loop(self.target, self.runs, say=self.watcher.say, **options) as loop:
            replayed = None if shipped is None else loop.replay(shipped, REPLAYED)
            speed = {} if replayed is None else replayed.verification.get("speed", {})
            loop.until = self._until(speed.get("step_seconds", 0.5))
            ended = loop.run()
        verdicts = ended.verification.get("verdicts", [])
        self.outcome.findings["forge"] = ended.as_dict()
        if ended.champion == sha256_file(aligned) or ended.folder is None:
            reason = ended.ended if replayed is None else replayed.ended
            wrong = reason.startswith(("rejected", "not confirmed")) and " by G7, " not in reason
            self.prove("a faster engine passes the gates here", not wrong, f"none was elected: {reason}")
            return
        self.champion = ended.folder / "engine.py"
        self.outcome.places["fastest engine, with its provenance"] = str(ended.folder)
        gates = sorted(
            {verdict["gate"] for verdict in verdicts or read_json(ended.folder / "provenance.json", "")["verdicts"]}
        )
        evidence = f"{ended.gain:.2f} times the aligned engine's speed, raced in one run; passed {', '.join(gates)}"
        self.prove("a faster engine passes the gates here", ended.gain > 1.0, evidence)

    def _until(self, step_seconds: float) -> float:
        """When to stop searching: ``search`` seconds from now, or earlier, so that the other stages have their time."""
        training = self.target.recipe.steps * (step_seconds + _BESIDE)
        return min(time.monotonic() + self.search, self.began + WHOLE - training - _REST)

    def train(self, progress: Progress) -> None:
        progress.own_display()
        restart = self.restart or self._of_another_engine()
        engine = None if self.champion is None else str(self.champion)
        options: dict[str, Any] = {"engine": engine, "resume": not restart, "restart": restart}
        summary = train(self.target, runs=self.runs, console=self.watcher.console, **options)
        self.summary = summary
        self.outcome.findings["train"] = summary
        self.outcome.places["checkpoint"] = summary["checkpoint"]
        self.outcome.places["metrics, TensorBoard"] = str(self.folder / "train")
        if not summary["finished"]:
            self.prove("training ran to its end", False, f"stopped by {summary['interrupted']}; run it again to go on")
            raise Stopped
        loss, unigram = summary["held_out_loss"], summary["unigram_loss"]
        evidence = f"held-out loss {loss:.3f} after {summary['steps']} steps; unigram {unigram:.3f}"
        self.prove("the model learned more than how frequent tokens are", loss < unigram - 0.5, evidence)

    def _of_another_engine(self) -> bool:
        """Whether the run's checkpoints were made with another engine than the one that trains now."""
        root = self.folder / "checkpoints"
        if not checkpoint.steps_in(root):
            return False
        journal = self.folder / "train" / "run.json"
        now = sha256_file(self.champion or self.folder / "engine" / "engine.py")
        before = read_object(journal, "train again", engine=dict)["engine"]["sha256"] if journal.is_file() else None
        if before != now:
            self.watcher.say("training anew: the checkpoints are another engine's")
        return before != now

    def compare(self, progress: Progress) -> None:
        """The reference and the aligned engine take the run's first steps, from the same weights, on the same batches
        of real text. Where a faster engine trained, how far its losses are from theirs is told."""
        lines = read_journal(self.folder / "train" / "metrics.jsonl")
        trained = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}
        target, steps = self.target, min(COMPARED, self.target.recipe.steps)
        loader = Loader(open_data(self.folder / "data", target, verify=False), target)
        name = target.reference.name

        def first_steps(engine: EngineProcess, who: str) -> tuple[list[tuple[float, float]], str]:
            engine.load(initial_weights(target.model, target.recipe.seed))
            found = []
            for step in range(steps):
                progress(f"{who}, step {step + 1}", step / steps)
                result = engine.step(loader.batch_at(step), learning_rate(target.recipe, step))
                found.append((float(result.loss), float(result.grad_norm)))
            return found, weight_hash(engine.state())

        progress(f"{name}, starting", 0.0)
        with start_reference(target) as reference:
            theirs, digest = first_steps(reference, name)
        ours, beside = [trained.get(step + 1) for step in range(steps)], ""
        if self.champion is not None:
            pairs = [(mine, due) for mine, due in zip(ours, theirs, strict=True) if mine is not None]
            losses, norms = (max(abs(mine[i] / due[i] - 1) for mine, due in pairs) for i in range(2))
            beside = f"; of the engine that trained losses differ by {losses:.0e} and norms by {norms:.0e} at most"
            with EngineProcess(self.folder / "engine" / "engine.py", target) as aligned:
                ours = first_steps(aligned, "aligned engine")[0]
        both = enumerate(zip(ours, theirs, strict=True), 1)
        differ = next(
            (f"step {n}: loss and norm {mine}, the reference's {due}" for n, (mine, due) in both if mine != due),
            None,
        )
        evidence = differ or f"losses and norms of the first {steps} steps equal, bit for bit{beside}"
        self.outcome.findings["compared"] = {"steps": steps, "weight_sha256": digest, "difference": differ}
        who = "training" if self.champion is None else "the aligned engine"
        self.prove(f"{who} does what {name} does on the same text", differ is None, evidence)

    def export(self, progress: Progress) -> None:
        progress("writing", 0.0)
        exported = export_hf(Path(self.summary["checkpoint"]), self.folder / "export" / "hf", say=self.watcher.say)
        progress("comparing logits", 0.5)
        parity = logits_parity(exported)
        self.exported = exported.folder
        self.outcome.places["Hugging Face model"] = str(exported.folder)
        evidence = f"logits differ by {parity.max_difference:.1e} at most, of up to {parity.largest:.1f}"
        evidence += f"; tolerance {TOLERANCE:g} of the largest"
        self.prove("transformers loads the model and computes what the engine does", parity.passed, evidence)

    def generate(self, prompt: str, progress: Progress) -> None:
        progress("generating", 0.0)
        reply = generate(self.exported, prompt, max_new_tokens=96, temperature=0.7, seed=0)
        self.outcome.findings["reply"] = {"prompt": reply.prompt, "text": reply.text, "tokens": reply.tokens}


def _shipped(target: Target) -> Proposal | None:
    """What ``engines/<target>`` holds: the engine itself if it was made for this very target, else one of its plan."""
    folder = Path("engines") / target.name
    if not (folder / "plan.toml").is_file() or not (folder / "engine.py").is_file():
        return None
    plan = Plan.read(folder / "plan.toml")
    made_for = parse_target(read_object(folder / "provenance.json", "restore it", target=dict)["target"], file=folder)
    source = (folder / "engine.py").read_text(encoding="utf-8")
    if target_key(made_for) != target_key(target):
        source = write_engine(target, plan)
    return Proposal(source, f"the elected engine of {folder}", plan)


class Quiet:
    """A watcher that shows nothing."""

    def __init__(self) -> None:
        self.console = Console(quiet=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        yield _Silent()

    def say(self, line: str) -> None:
        pass


class _Silent:
    def __call__(self, what: str, share: float) -> None:
        pass

    def own_display(self) -> None:
        pass


def _remove(folder: Path) -> None:
    """Removes a folder whose manifest goes first, so that a half-removed one is never taken for a whole one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)
