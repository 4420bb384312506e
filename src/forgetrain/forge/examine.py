"""G1, G2 and G3 of one engine file, which is frozen: run in processes of its own and never changed.

    examination = examine(Path("engine.py"), gates, golden_truth(record, gates), lambda: reference)
    [verdict.gate for verdict in examination.verdicts]      # up to the first gate that fails

The engine is driven through the engine contract alone, so any engine file can be examined. When G2 fails, the step at
which the trajectories part is run once more on the reference, tap by tap, and the engine is laid beside it: the finding
is a tap there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from forgetrain.engine.process import EngineFailure, EngineProcess
from forgetrain.forge.collect import RANK_STEPS, start_reference
from forgetrain.forge.truth import Start, Truth, observe, record_truth
from forgetrain.gates.g1 import Divergence, first_divergence, g1
from forgetrain.gates.g2 import StepRecord, first_parting, g2
from forgetrain.gates.g3 import g3
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.evidence import trajectory
from forgetrain.judge.hidden import Stream, draw_seed, hidden_weights
from forgetrain.judge.sandbox import Sandbox
from forgetrain.spec.target import Target

RANKS = 2

Tell = Callable[[str, float], None]
T = TypeVar("T")


class ReferenceFailure(Exception):
    """The reference's process broke, which is no finding about the engine."""


@dataclass
class Examination:
    """verdicts: of the gates that were run, at most the last failed. divergence: the first difference in a step, from
    G1 or from the step at which G2 failed; truth: that step of G2's. broken: why the engine is no engine."""

    verdicts: list[Verdict] = field(default_factory=list)
    divergence: Divergence | None = None
    truth: Truth | None = None
    broken: str | None = None


def examine(
    file: Path,
    gates: Target,
    truth: Truth,
    reference: Callable[[], EngineProcess],
    *,
    box: Sandbox | None = None,
    tell: Tell = lambda stage, share: None,
) -> Examination:
    """``gates``: the target at the gates' shape. ``truth``: the golden step. ``reference``: the one running at world
    size 1, first asked for after G1, so that what is no engine waits for none; on a GPU it is closed before G3.
    ``box``: the sandbox, for files that this program did not write.

    Raises:
        ReferenceFailure: the reference broke; whatever the engine does is in the verdicts.
    """
    found = Examination()
    sandboxed = box is not None and box.sandboxed

    def start(ranks: int = 1) -> EngineProcess:
        if box is None:
            return EngineProcess(file, gates, ranks=ranks)
        return EngineProcess(file, gates, ranks=ranks, wrap=box.wrap, limits=box.limits)

    gate = "G1"
    try:
        with start() as candidate:
            tell("G1: one step, tap by tap", 0.5)
            found.divergence, equal = first_divergence(truth.stream(), observe(candidate, truth), gates.model)
            found.verdicts.append(g1(found.divergence, equal, sandboxed=sandboxed))
            if not found.verdicts[-1].passed:
                found.broken = (
                    None if found.divergence is None or found.divergence.problem is None else str(found.divergence)
                )
                return found
            gate = "G2"
            tell("G2: a trajectory on unseen batches", 0.55)
            run = _hidden_run(gates, _of_reference(reference))
            middle, steps = _candidate_run(candidate, run)
            verdict = g2(run.due, steps, steps=gates.gates.steps, seed=run.stream.seed, sandboxed=sandboxed)
            found.verdicts.append(verdict)
            if not verdict.passed:
                _look_into(found, run, steps, candidate, reference())
                return found
        gate = "G3"
        tell("G3: a fresh process goes on from the saved state", 0.8)
        half = len(run.due) // 2
        with start() as fresh:
            fresh.restore(middle)
            resumed = list(trajectory(fresh, run.stream, half, len(run.due)))
        tell("G3: two ranks", 0.85)
        if gates.hardware.device == "cuda":
            reference().close()  # it is not asked again, and three of a large model are too many for one GPU
        due = _of_reference(lambda: _two_ranks(start_reference(gates, ranks=RANKS), run))
        ranks = _two_ranks(start(RANKS), run)
        found.verdicts.append(g3(due, ranks, steps[half:], resumed, ranks=RANKS, sandboxed=sandboxed))
    except EngineFailure as failure:
        found.broken = str(failure)
        found.verdicts.append(_failed(gate, failure, sandboxed))
    return found


def later_truth(reference: EngineProcess, gates: Target, seed: int, step: int) -> Truth:
    """One step of the reference after ``step`` others, from weights, batches and rates made from ``seed``."""
    return _of_reference(lambda: _later(reference, hidden_weights(gates.model, seed), Stream(gates, seed), step))


@dataclass(frozen=True)
class _Run:
    weights: Mapping[str, Tensor]
    stream: Stream
    due: list[StepRecord]


def _hidden_run(gates: Target, reference: EngineProcess) -> _Run:
    """The reference's trajectory from a seed that nobody knew before now."""
    seed = draw_seed()
    weights, stream = hidden_weights(gates.model, seed), Stream(gates, seed)

    def run() -> list[StepRecord]:
        reference.load(weights)
        return list(trajectory(reference, stream, 0, gates.gates.steps))

    return _Run(weights, stream, _of_reference(run))


def _candidate_run(candidate: EngineProcess, run: _Run) -> tuple[dict[str, Any], list[StepRecord]]:
    """The engine's state in the middle, and its whole trajectory."""
    half = len(run.due) // 2
    candidate.load(run.weights)
    steps = list(trajectory(candidate, run.stream, 0, half))
    middle = candidate.state()
    return dict(middle), steps + list(trajectory(candidate, run.stream, half, len(run.due)))


def _two_ranks(engine: EngineProcess, run: _Run) -> list[StepRecord]:
    with engine:
        engine.load(run.weights)
        return list(trajectory(engine, run.stream, 0, min(RANK_STEPS, len(run.due))))


def _look_into(
    found: Examination, run: _Run, steps: list[StepRecord], candidate: EngineProcess, reference: EngineProcess
) -> None:
    """Finds the tap at which the first step that differs does, from the reference's own state before it."""
    parting = first_parting(run.due, steps)
    if parting is None or parting.step >= len(run.due):
        return
    found.truth = _of_reference(lambda: _later(reference, run.weights, run.stream, parting.step))
    found.divergence, _ = first_divergence(
        found.truth.stream(), observe(candidate, found.truth), candidate.target.model
    )
    where = "but that step alone, from the reference's state, is equal: the engine keeps something between steps"
    if found.divergence is not None:
        where = f"within that step the first difference is {found.divergence}"
    last = found.verdicts[-1]
    detail = {**last.detail, "divergence": None if found.divergence is None else found.divergence.as_dict()}
    found.verdicts[-1] = replace(last, detail=detail, explanation=f"{last.explanation}; {where}")


def _later(reference: EngineProcess, weights: Mapping[str, Tensor], stream: Stream, step: int) -> Truth:
    start = Start(weights=weights)
    if step > 0:
        start.put(reference)
        for earlier in range(step):
            reference.step(stream.at(earlier), stream.rate(earlier))
        start = Start(state=reference.state())
    title = f"step {step} from seed {stream.seed}"
    return record_truth(reference, stream.target, title, start, stream.at(step), stream.rate(step))


def _of_reference(run: Callable[[], T]) -> T:
    try:
        return run()
    except EngineFailure as failure:
        raise ReferenceFailure(f"the reference broke: {failure}") from failure


def _failed(gate: str, failure: EngineFailure, sandboxed: bool) -> Verdict:
    detail = {"failure": failure.kind, "traceback": failure.detail}
    return Verdict(gate, False, detail=detail, explanation=f"the engine broke: {failure}", sandboxed=sandboxed)
