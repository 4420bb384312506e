"""What can be judged against a record that a script of the user's own left behind (``forgetrain.capture``).

There is no reference to start, so there are no unseen batches, no second rank and no restart: G2 and G3 are not judged,
and every verdict here says so. What is there instead: the first and the last recorded step tap by tap, every recorded
step's loss, norm and hash of the weights, and, for the script itself, the float64 oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from forgetrain.engine.contract import Batch, Shard
from forgetrain.engine.process import EngineFailure, EngineProcess
from forgetrain.forge.collect import ReferenceRejected
from forgetrain.forge.examine import Examination
from forgetrain.forge.truth import Start, Truth, observe, ordered_names
from forgetrain.gates.g0 import NEAR, relative_errors
from forgetrain.gates.g1 import first_divergence, g1
from forgetrain.gates.g2 import StepRecord, first_parting
from forgetrain.gates.verdict import Verdict
from forgetrain.golden.record import GoldenRecord
from forgetrain.judge.sandbox import Sandbox
from forgetrain.numerics.oracle import OracleStep, oracle_step

LIMITS = "captured in a script, so there is no reference to run: G2 (unseen batches) and G3 (two ranks) were not judged"


def recorded_truths(record: GoldenRecord, golden: Truth) -> list[Truth]:
    """The golden step, and the last recorded one from the state that the script had before it, if there is another."""
    later = record.later
    if later is None:
        return [golden]
    number = len(record.trajectory(1)) - 1
    state = {
        name.removeprefix("start/"): Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim())
        for name, tensor in later.items()
        if name.startswith("start/")
    }
    last = Truth(
        golden.target,
        f"recorded step {number}",
        Start(state=state),
        record.batches[number],
        record.learning_rates[number],
        later,
        ordered_names(golden.target, later),
    )
    return [golden, last]


def judge_script(truths: list[Truth]) -> Verdict:
    """What of G0 a record allows: clipped gradients of its tap-by-tap steps near the float64 oracle, each from the
    script's own weights. That the script repeats itself bit for bit only a second run of it can show.

    Raises:
        ReferenceRejected: it is not near. The explanation names the first tap that is not.
    """
    worst, where = 0.0, ""
    for truth in truths:
        weights = _weights(truth)
        due = oracle_step(truth.target, weights, truth.batch, 0.0)
        errors = relative_errors(_clipped(truth, weights), due.clipped)
        name, error = max(errors.items(), key=lambda item: item[1])
        if error > NEAR:
            exact = oracle_step(truth.target, weights, truth.batch, 0.0, taps=True)
            raise ReferenceRejected(_wrong(truth, exact, name, error))
        worst, where = max((worst, where), (error, f"{name}, {truth.title}"))
    text = (
        f"the script is near the float64 oracle: its largest relative error is {worst:.2e} ({where}), allowed "
        f"{NEAR:.0e}; it was run once, so that it repeats itself was not judged"
    )
    return Verdict("G0", True, worst, NEAR, NEAR - worst, explanation=text)


def examine_recorded(
    file: Path,
    record: GoldenRecord,
    truths: list[Truth],
    *,
    box: Sandbox | None = None,
    tell: Callable[[str, float], None] = lambda stage, share: None,
) -> Examination:
    """G1 on the golden step, then the recorded trajectory; at its parting the last recorded step is looked into."""
    found = Examination()
    sandboxed = box is not None and box.sandboxed
    golden, last = truths[0], truths[-1]
    gates = golden.target
    options: dict[str, Any] = {} if box is None else {"wrap": box.wrap, "limits": box.limits}
    gate = "G1"
    try:
        with EngineProcess(file, gates, **options) as engine:
            tell("G1: one step, tap by tap", 0.5)
            found.divergence, equal = first_divergence(golden.stream(), observe(engine, golden), gates.model)
            verdict = g1(found.divergence, equal, sandboxed=sandboxed)
            found.verdicts.append(replace(verdict, explanation=f"{verdict.explanation}; {LIMITS}"))
            if found.divergence is not None:
                found.broken = None if found.divergence.problem is None else str(found.divergence)
                return found
            gate = "trajectory"
            tell("the recorded trajectory", 0.7)
            verdict = _trajectory(engine, record, sandboxed)
            if not verdict.passed:
                found.divergence, _ = first_divergence(last.stream(), observe(engine, last), gates.model)
                text = f"{last.title}, alone, is equal"
                if found.divergence is not None:
                    text = f"within {last.title} the first difference is {found.divergence}"
                verdict = replace(verdict, explanation=f"{verdict.explanation}; {text}")
            found.verdicts.append(verdict)
    except EngineFailure as failure:
        found.broken = str(failure)
        detail = {"failure": failure.kind, "traceback": failure.detail}
        text = f"the engine broke: {failure}"
        found.verdicts.append(Verdict(gate, False, detail=detail, explanation=text, sandboxed=sandboxed))
    return found


def _trajectory(engine: EngineProcess, record: GoldenRecord, sandboxed: bool) -> Verdict:
    due = [StepRecord(**point) for point in record.trajectory(1)]
    engine.load(record.weights)
    steps = [_step(engine, batch, rate) for batch, rate in zip(record.batches, record.learning_rates, strict=True)]
    parting = first_parting(due, steps)
    text = f"all {len(due)} recorded steps agree bit for bit in loss, gradient norm and weights"
    if parting is not None:
        text = f"the recorded trajectory and the engine's part at {parting}"
    equal = len(due) if parting is None else parting.step
    return Verdict(
        "trajectory",
        parting is None,
        equal,
        len(due),
        equal - len(due),
        first_divergence=None if parting is None else f"step {parting.step}: {parting.quantity}",
        explanation=text,
        sandboxed=sandboxed,
    )


def _step(engine: EngineProcess, batch: Batch, rate: float) -> StepRecord:
    result = engine.step(batch, rate)
    return StepRecord(float(result.loss), float(result.grad_norm), bool(result.applied), engine.weight_hash())


def _weights(truth: Truth) -> dict[str, Tensor]:
    if truth.start.state is not None:
        return {n: truth.start.state[f"master/{n}"].tensor for n in truth.target.model.parameter_shapes()}
    assert truth.start.weights is not None
    return dict(truth.start.weights)


def _clipped(truth: Truth, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: truth.tensors[f"{name}#clipped"] for name in weights if f"{name}#clipped" in truth.tensors}


def _wrong(truth: Truth, exact: OracleStep, name: str, error: float) -> Verdict:
    """The verdict that names the first place at which the script is not what the target says."""
    seen = {tap: tensor for tap, tensor in exact.taps if tap in truth.tensors}
    errors = relative_errors(truth.tensors, seen)
    tap = next((tap for tap, value in errors.items() if value > NEAR), f"{name}#clipped")
    far = errors.get(tap, error)
    text = (
        f"the script does not compute what the target says: in {truth.title} the first tap that is far from the "
        f"float64 oracle is {tap}, relative error {far:.2e}, allowed {NEAR:.0e}"
    )
    return Verdict("G0", False, far, NEAR, NEAR - far, first_divergence=tap, explanation=text)
