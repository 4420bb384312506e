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
from forgetrain.durable import read_json, sha256_file, write_json
from forgetrain.engine.contract import weight_hash
from forgetrain.forge.align import align, alignable
from forgetrain.forge.collect import ReferenceRejected, open_or_collect, start_reference
from forgetrain.golden.record import MANIFEST
from forgetrain.numerics.init import initial_weights
from forgetrain.publish.generate import generate
from forgetrain.publish.hf import export_hf
from forgetrain.publish.parity import TOLERANCE, logits_parity
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.target import Target
from forgetrain.train import checkpoint
from forgetrain.train.loop import train
from forgetrain.train.metrics import read_journal
from forgetrain.train.verified import find_verdicts

#: Stage → what it does, in the words that a person reads while it runs.
STAGES = {
    "collect": "run the reference, judge it, keep what it did",
    "align": "build an engine that equals it bit for bit",
    "data": "turn text into tokens",
    "train": "train the model with that engine",
    "compare": "let the reference take the same first steps",
    "export": "write the model for Hugging Face, check its logits",
    "generate": "ask the model to go on with a text",
}

PROMPT = "import os\n\n\ndef "
#: Steps of training that the reference repeats on the same batches; each takes it seconds on a CPU.
COMPARED = 5


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


def run_target(target: Target, runs: Path, watcher: Watcher, *, prompt: str = PROMPT, restart: bool = False) -> Outcome:
    """Runs every stage and returns what was proved; a failed gate ends the run early, with the outcome.

    restart: take nothing from earlier runs.

    Raises:
        UserError: bad input, or a disk that is full.
        EngineFailure: the reference's process broke.
    """
    alignable(target)
    job = _Job(target, runs / target.name, runs, watcher, restart)
    outcome = job.run(STAGES, prompt)
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
    outcome: Outcome = field(init=False)

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
        stamp = folder / "golden.json"
        sections = {name: value for name, value in self.target.plain().items() if name not in ("search", "train")}
        golden = {"manifest": sha256_file(self.record.folder / MANIFEST), "target": sections}
        engine = folder / "engine.py"
        if not self.restart and stamp.is_file() and engine.is_file() and read_json(stamp, "align again") == golden:
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
        write_json(stamp, golden)
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

    def train(self, progress: Progress) -> None:
        progress.own_display()
        restart = self.restart or self._of_another_engine()
        summary = train(self.target, runs=self.runs, resume=not restart, restart=restart, console=self.watcher.console)
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
        """Whether the run's checkpoints were made with an engine that is not the aligned one."""
        root = self.folder / "checkpoints"
        if not checkpoint.steps_in(root):
            return False
        journal = self.folder / "train" / "run.json"
        now = sha256_file(self.folder / "engine" / "engine.py")
        before = read_json(journal, "train again")["engine"]["sha256"] if journal.is_file() else None
        if before != now:
            self.watcher.say("training anew: the checkpoints are another engine's")
        return before != now

    def compare(self, progress: Progress) -> None:
        """The reference takes the run's first steps, from the same weights, on the same batches of real text."""
        lines = read_journal(self.folder / "train" / "metrics.jsonl")
        ours = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line}
        target, steps = self.target, min(COMPARED, self.target.recipe.steps)
        loader = Loader(open_data(self.folder / "data", target, verify=False), target)
        differ = None
        progress(f"{target.reference.name}, starting", 0.0)
        with start_reference(target) as reference:
            reference.load(initial_weights(target.model, target.recipe.seed))
            for step in range(steps):
                progress(f"{target.reference.name}, step {step + 1}", step / steps)
                result = reference.step(loader.batch_at(step), learning_rate(target.recipe, step))
                theirs = (float(result.loss), float(result.grad_norm))
                if ours.get(step + 1) != theirs and differ is None:
                    differ = f"step {step + 1}: loss and norm {ours.get(step + 1)}, the reference's {theirs}"
            digest = weight_hash(reference.state())
        evidence = differ or f"losses and norms of the first {steps} steps equal, bit for bit"
        self.outcome.findings["compared"] = {"steps": steps, "weight_sha256": digest, "difference": differ}
        self.prove(f"training does what {target.reference.name} does on the same text", differ is None, evidence)

    def export(self, progress: Progress) -> None:
        progress("writing", 0.0)
        exported = export_hf(Path(self.summary["checkpoint"]), self.folder / "export" / "hf")
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
