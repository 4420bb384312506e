"""Aligning: from a textbook plan to an engine that equals the reference bit for bit, or to where it cannot.

    result = align(target, Path("runs/nano-cpu/engine"), record)
    result.passed, result.plan, result.verdicts

1. Walk (``forge.search``): against the golden step, then against a step in the middle of a short run of the reference
   from weights that are far from their initial values, where variants that agree on the first step part.
2. Freeze: the plan is written out as one file; its SHA-256 is what the verdicts are about.
3. Judge the file in processes of its own: G1 on the golden step; G2 on a trajectory whose weights, batches and rates
   come from a seed that is drawn only now; G3 at world size 2 and across a restart. When G2 fails, the step at which it
   did becomes one more truth to walk against, and a new candidate is frozen.

Where a script was captured there is no reference to run: forge/captured.py says what is judged instead.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from forgetrain.durable import new_folder, sha256_file, write_json
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import source_hash, write_engine
from forgetrain.errors import UserError
from forgetrain.forge.captured import examine_recorded, judge_script, recorded_truths
from forgetrain.forge.collect import check_reference, prepare_reference, start_reference
from forgetrain.forge.examine import RANKS, Examination, Tell, examine, later_truth
from forgetrain.forge.search import Attempt, Reach, Search
from forgetrain.forge.truth import Start, Truth, ordered_names
from forgetrain.gates.g1 import Divergence, g1
from forgetrain.gates.verdict import Verdict
from forgetrain.golden.record import MANIFEST, GoldenRecord
from forgetrain.judge.hidden import derive
from forgetrain.judge.sandbox import sandbox
from forgetrain.spec.target import Target

ORIGIN = "golden.json"

#: Candidates that are frozen and judged, at most; each failure of G2 gives the walk one more step to agree with.
CANDIDATES = 4


@dataclass
class AlignResult:
    """plan: None when an engine file was diagnosed. divergence: the finding, when G1 does not hold or a later step
    was looked into. broken: the engine does not do what the contract says (an exception, NaN, a wrong shape)."""

    target: str
    engine: Path | None
    sha256: str | None
    plan: Plan | None
    verdicts: list[Verdict]
    divergence: Divergence | None = None
    attempts: list[Attempt] = field(default_factory=list)
    broken: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """All three verdicts: G1 to G3, or of a captured record G0, G1 and the recorded trajectory."""
        return len(self.verdicts) == 3 and all(verdict.passed for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "passed": self.passed,
            "engine": None if self.engine is None else str(self.engine),
            "sha256": self.sha256,
            "plan": None if self.plan is None else dict(self.plan.items()),
            "divergence": None if self.divergence is None else self.divergence.as_dict(),
            "verdicts": [verdict.as_dict() for verdict in self.verdicts],
            "attempts": [attempt.as_dict() for attempt in self.attempts],
            "broken": self.broken,
            "seconds": self.seconds,
        }


def golden_truth(record: GoldenRecord, target: Target) -> Truth:
    """The record's first step; ``target`` is at the gates' shape."""
    evidence = record.evidence
    names = ordered_names(target, evidence)
    start = Start(weights=record.weights)
    return Truth(target, "the golden step", start, record.batches[0], record.learning_rates[0], evidence, names)


def align(
    target: Target,
    out: Path,
    record: GoldenRecord,
    *,
    start: Plan | None = None,
    report: Tell = lambda stage, share: None,
    say: Callable[[str], None] = lambda line: None,
) -> AlignResult:
    """Finds a plan, writes its engine, and judges it; writes ``engine.py``, ``plan.toml``, ``verdicts.json``
    and ``golden.json`` to ``out`` when G1 to G3 hold, else to a folder beside it whose name ends in ``.failed``.

    start: the plan from which the search goes on, the textbook's unless given: one that was found for fewer layers
    spares a large model the walk. report: gets the stage that begins and the share of the work that is done. say: one
    line for each attempt and finding.

    Raises:
        UserError: the reference cannot be run for this target.
        ReferenceFailure: the reference's process broke.
        ReferenceRejected: the captured script does not compute what the target says.
    """
    began = time.monotonic()
    gates = alignable(target)
    truth = golden_truth(record, gates)
    captured = recorded_truths(record, truth) if target.reference.name == "capture" else None
    if captured is None:
        prepare_reference(gates)
    first = [] if captured is None else [judge_script(captured)]
    search = Search(gates, [truth] if captured is None else captured, lambda attempt: say(str(attempt)))
    report("walking the taps of the golden step", 0.0)
    plan, reach = search.walk(start or Plan.textbook())
    say(f"golden step: {reach}")
    result = AlignResult(target.name, None, None, plan, [], reach.divergence)
    if reach.agrees and captured is not None:
        _judge_plan(result, plan, target, record, lambda file: examine_recorded(file, record, captured, tell=report))
    elif reach.agrees:
        with start_reference(gates) as reference:
            report("walking the taps of a later step", 0.3)
            search.truths.append(later_truth(reference, gates, derive(record.manifest["seed"], "walk"), 1))
            for _ in range(CANDIDATES):
                plan, reach = search.walk(plan)
                say(f"{search.truths[-1].title}: {reach}")
                result.plan, result.divergence = plan, reach.divergence
                if not reach.agrees:
                    break
                result.plan = plan = search.settle(plan)
                judge = partial(examine, gates=gates, truth=truth, reference=lambda: reference, tell=report)
                found = _judge_plan(result, plan, target, record, judge)
                if found.truth is None or found.divergence is None:
                    break
                say(found.verdicts[-1].explanation)
                search.truths.append(found.truth)
    if not reach.agrees:
        result.verdicts = [_not_reached(reach, "G2" if captured is None else "trajectory")]
    result.verdicts = first + result.verdicts
    result.attempts = search.attempts
    result.seconds = time.monotonic() - began
    _write(result, target, record, out)
    return result


def diagnose(
    target: Target,
    file: Path,
    record: GoldenRecord,
    *,
    report: Tell = lambda stage, share: None,
) -> AlignResult:
    """The same gates for anyone's engine file, in the sandbox where there is one; the file is not changed.

    Raises:
        UserError: there is no such file, or the reference cannot be run for this target.
        ReferenceFailure: the reference's process broke.
        ReferenceRejected: the captured script does not compute what the target says.
    """
    began = time.monotonic()
    if not file.is_file():
        raise UserError("no such engine file", file=file, remedy="name an engine's .py file")
    gates = alignable(target)
    sha256 = sha256_file(file)
    truth, box = golden_truth(record, gates), sandbox(file, gates)
    if target.reference.name == "capture":
        captured = recorded_truths(record, truth)
        script = judge_script(captured)
        found = examine_recorded(file, record, captured, box=box, tell=report)
        found.verdicts.insert(0, script)
    else:
        with ExitStack() as running:
            reference = cache(lambda: running.enter_context(start_reference(gates)))
            found = examine(file, gates, truth, reference, box=box, tell=report)
    return AlignResult(
        target.name,
        file,
        sha256,
        None,
        found.verdicts,
        found.divergence,
        broken=found.broken,
        seconds=time.monotonic() - began,
    )


def alignable(target: Target) -> Target:
    """The target at the gates' shape. Raises UserError for what could not be aligned, before anything is run."""
    if target.reference.name == "capture":
        return target.at_gates_shape()
    check_reference(target)
    if target.gates.batch_size % RANKS:
        raise UserError(
            f"is not a multiple of {RANKS}, the world size of G3",
            key="gates.batch_size",
            value=target.gates.batch_size,
            remedy="choose an even number",
        )
    return target.at_gates_shape()


def _judge_plan(
    result: AlignResult,
    plan: Plan,
    target: Target,
    record: GoldenRecord,
    judge: Callable[[Path], Examination],
) -> Examination:
    """Freezes the plan's engine and examines it."""
    source = write_engine(target, plan, _facts(target, record))
    result.sha256 = source_hash(source)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "engine.py"
        file.write_text(source, encoding="utf-8")
        found = judge(file)
    result.verdicts, result.broken = found.verdicts, found.broken
    result.divergence = found.divergence
    return found


def origin(target: Target, record: GoldenRecord) -> dict[str, Any]:
    """What an engine was aligned with, as ``ORIGIN`` beside it says: the same again would give the same engine."""
    sections = {name: value for name, value in target.plain().items() if name not in ("search", "train")}
    return {"manifest": sha256_file(record.folder / MANIFEST), "target": sections}


def _not_reached(reach: Reach, later: str) -> Verdict:
    """The verdict of a walk at whose end nothing helped; ``later`` is the gate of steps after the golden one."""
    if reach.divergence is None:
        return Verdict("G1", False, explanation=f"the engine {reach}")
    verdict = g1(reach.divergence, reach.equal)
    if reach.truths == 0:
        return verdict
    text = f"the golden step is equal; in a later one {verdict.explanation}; no choice helps"
    return replace(verdict, gate=later, explanation=text)


def _facts(target: Target, record: GoldenRecord) -> list[str]:
    reference, environment = record.manifest["reference"]["name"], record.manifest["environment"]
    versions = ", ".join(f"{key} {value}" for key, value in environment.items())
    digest = sha256_file(record.folder / MANIFEST)
    return [
        f"Aligned with {reference} in {target.precision.dtype}: {versions}.",
        f"Golden record {digest}.",
        "Its verdicts are kept under this file's SHA-256, in verdicts.json beside it.",
    ]


def _write(result: AlignResult, target: Target, record: GoldenRecord, out: Path) -> None:
    """Engine, plan and verdicts, all three or none."""
    assert result.plan is not None
    folder = out if result.passed else out.with_name(out.name + ".failed")
    source = write_engine(target, result.plan, _facts(target, record))
    result.sha256 = source_hash(source)
    with new_folder(folder) as fresh:
        (fresh / "engine.py").write_text(source, encoding="utf-8")
        (fresh / "plan.toml").write_text(result.plan.toml(), encoding="utf-8")
        verdicts = [verdict.as_dict() for verdict in result.verdicts]
        write_json(fresh / "verdicts.json", {"sha256": result.sha256, "verdicts": verdicts})
        write_json(fresh / ORIGIN, origin(target, record))
    result.engine = folder / "engine.py"
