"""How the judge makes the evidence of each gate: what is run, on what, and against what. The gates themselves are pure
functions in ``forgetrain.gates``."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forgetrain.engine.contract import Batch, weight_hash
from forgetrain.engine.process import EngineProcess
from forgetrain.gates.g1 import first_divergence, g1
from forgetrain.gates.g2 import g2
from forgetrain.gates.g4 import ErrorPool, g4
from forgetrain.gates.g5 import g5
from forgetrain.gates.g6 import Repeat, by_rounding, g6, of_seeds, weight_distance
from forgetrain.gates.g7 import PAIRS, g7
from forgetrain.gates.g8 import g8
from forgetrain.gates.motion import motion
from forgetrain.gates.replay import Outcome, replay, replay_distance, step_distance
from forgetrain.gates.update import update
from forgetrain.gates.verdict import Verdict
from forgetrain.judge import layouts
from forgetrain.judge.clock import Replay, race
from forgetrain.judge.evidence import (
    SCALARS,
    State,
    add_to,
    expected_start,
    from_weights,
    gradients_due,
    gradients_of,
    masters,
    starting_state,
)
from forgetrain.judge.hidden import Stream, derive, hidden_weights
from forgetrain.memory import give_back
from forgetrain.numerics.compare import difference
from forgetrain.numerics.device import release
from forgetrain.numerics.init import initial_weights
from forgetrain.numerics.oracle import oracle_step
from forgetrain.spec.target import Target

if TYPE_CHECKING:
    from forgetrain.judge.runner import Trial

_HELD_OUT = 4  # batches
#: A distance of weights that rounding alone explains after training, by dtype: the root of its eps.
_FLOOR = {"fp32": 3.5e-4, "bf16": 0.09}
_DISTANCE_FACTOR = 3.0
_SCALAR_FACTOR = 4.0  # times a known-good engine's error, of a loss and of a norm
_OBVIOUS = {"loss": 0.25, "grad_norm": 0.5}  # no rounding explains more


def contract(trial: Trial) -> Iterator[Verdict]:
    """What the contract says of load, step, loss, state and restore, each held against the oracle or the state."""
    target = trial.judge.gates_target
    stream, weights = trial.stream(target, "contract"), hidden_weights(target.model, trial.seed)
    with trial.process(target, guard=True) as engine:
        problem = next(_breaches(trial, engine, stream, weights), None)
    text = problem or "load, step, loss, state and restore do what the contract says, and inputs stay as they were"
    yield Verdict("contract", problem is None, explanation=text, sandboxed=trial.sandboxed)


def _breaches(trial: Trial, engine: EngineProcess, stream: Stream, weights: dict[str, Tensor]) -> Iterator[str | None]:
    """What is wrong with the engine, in the order in which it shows."""
    target = engine.target
    batch, lr, precision = stream.at(0), stream.rate(0), target.precision.kept

    def truth(weights: dict[str, Tensor]) -> dict[str, float]:
        found = oracle_step(target, weights, batch, lr, precision=precision, device=engine.device)
        return {"loss": float(found.loss), "grad_norm": float(found.grad_norm)}

    allowances: dict[str, float] = {}

    def scalars(due: dict[str, float], found: dict[str, Tensor], when: str) -> Iterator[str]:
        release(engine.device)  # what the oracle took: the engine needs it
        for name, value in found.items():
            apart, allowed = abs(float(value) - due[name]), SCALARS[precision][name]
            if not apart <= allowed * abs(due[name]):
                allowances.update(allowances or _known_good_errors(trial, target, weights, batch, lr))
                allowed = max(allowed, allowances[name])
            if not apart <= allowed * abs(due[name]) < math.inf:
                yield f"{when} {name} is {float(value):.6g}, the oracle's is {due[name]:.6g}"

    engine.load(weights)
    start = engine.state()
    yield from _unequal(expected_start(target, weights, precision), start, "after load")
    due = truth(weights)
    yield from scalars(due, {"loss": engine.loss(batch)}, "before training")
    yield from _unequal(_plain(start), engine.state(), "after an evaluation")
    result = engine.step(batch, lr)
    yield from scalars(due, {"loss": result.loss, "grad_norm": result.grad_norm}, "at the first step")
    after = engine.state()
    if not bool(result.applied) or int(after["step"].tensor) != int(start["step"].tensor) + 1:
        yield "a step with a finite norm was not applied"
    # the same batch again, with other weights: what was remembered by input is wrong now
    due = truth(masters(after))
    yield from scalars(due, {"loss": engine.loss(batch)}, "on the same batch, after a step,")
    result = engine.step(batch, lr)
    yield from scalars(due, {"loss": result.loss, "grad_norm": result.grad_norm}, "on the same batch, again,")
    engine.restore(after)
    yield from _unequal(_plain(after), engine.state(), "after restore")
    engine.step(batch, lr)  # what it was given to restore must stay as it was, too
    broken = dict(weights)
    broken["model.norm.weight"] = weights["model.norm.weight"].clone().index_fill_(0, torch.tensor([0]), torch.inf)
    engine.load(broken)
    before = _plain(engine.state())
    result = engine.step(batch, lr)
    if bool(result.applied) or torch.isfinite(result.grad_norm):
        yield "an infinite weight gave a step that says it was applied, or a finite norm"
    yield from _unequal(before, engine.state(), "after a step without a finite norm")


def _known_good_errors(
    trial: Trial, target: Target, weights: dict[str, Tensor], batch: Batch, lr: float
) -> dict[str, float]:
    """How far, relative to the oracle's, a loss and a norm may be where rounding is more than the contract allows: a
    few times as far as an engine's that is known to be right, on the same way of its own, or by what its gradients are
    off; but never by more than is obvious. (MiniCPM4-0.5B from weights three times its initial ones: a loss in fp8 is
    6% off, a norm in bf16 9%, its gradients 40%.) Nothing of it is in the candidate's hands."""
    judge, kept = trial.judge, target.precision.kept
    with judge.trusted(judge.peer, target, precision=target.precision.dtype) as known_good:
        found = gradients_of(known_good, weights, batch, lr)  # loads, and takes the first step
        after = masters(known_good.state(("master",)))
        seen = [(known_good.loss(batch), known_good.step(batch, lr).grad_norm)]
        known_good.load(weights)
        seen.append((known_good.loss(batch), known_good.step(batch, lr).grad_norm))
    pool, allowed = ErrorPool(), {"loss": 0.0, "grad_norm": 0.0}
    for (loss, norm), start in zip(seen, (after, weights), strict=True):
        due = oracle_step(target, start, batch, lr, precision=kept, device=judge.device)
        for name, value, wanted in (("loss", loss, due.loss), ("grad_norm", norm, due.grad_norm)):
            allowed[name] = max(allowed[name], _SCALAR_FACTOR * abs(float(value) / float(wanted) - 1.0))
        if start is weights:
            add_to(pool, gradients_due(due), found, target.recipe.clip)
        del due
        release(judge.device)
    allowed["grad_norm"] = max(allowed["grad_norm"], _g4_ratio(target, kept) * pool.relative)
    return {name: min(value, _OBVIOUS[name]) for name, value in allowed.items()}


def _g4_ratio(target: Target, precision: str) -> float:
    return {"fp32": target.gates.g4_fp32_ratio, "bf16": target.gates.g4_bf16_ratio}[precision]


def bits_of_one_step(trial: Trial) -> Iterator[Verdict]:
    target = trial.judge.gates_target
    stream, weights = trial.stream(target, "G1"), hidden_weights(target.model, trial.seed)

    def evidence(engine: EngineProcess) -> Iterator[tuple[str, Tensor]]:
        engine.load(weights)
        yield from engine.probe(stream.at(0))
        result = engine.step(stream.at(0), stream.rate(0))
        yield from (("step.loss", result.loss), ("step.grad_norm", result.grad_norm))
        state = engine.state()
        for kind in ("exp_avg", "exp_avg_sq", "master"):
            for name in target.model.parameter_shapes():
                if f"{kind}/{name}" in state:  # what Muon steps has no second moment
                    yield f"{kind}/{name}", state[f"{kind}/{name}"].tensor
        yield "step", state["step"].tensor

    with trial.judge.trusted(trial.judge.reference, target) as reference:
        due = list(evidence(reference))
    with trial.process(target) as engine:
        found = first_divergence(due, evidence(engine), target.model)
    yield g1(*found, sandboxed=trial.sandboxed)


def bits_of_a_trajectory(trial: Trial) -> Iterator[Verdict]:
    target = trial.judge.gates_target
    steps, stream = target.gates.steps, trial.stream(target, "G2")
    weights = initial_weights(target.model, derive(trial.seed, "G2"))
    with trial.judge.trusted(trial.judge.reference, target) as reference:
        due = from_weights(reference, weights, stream, steps)
    with trial.process(target) as engine:
        found = from_weights(engine, weights, stream, steps)
    yield g2(due, found, steps=steps, seed=trial.seed, sandboxed=trial.sandboxed)


def updates(trial: Trial) -> Iterator[Verdict]:
    """G4.update at the first step and at later ones, whose number the seed decides, at low rates too; the worst of
    them."""
    target = trial.judge.gates_target
    stream, recipe = trial.stream(target, "G4.update"), target.recipe
    judged = functools.partial(update, device=trial.judge.device, sandboxed=trial.sandboxed)
    verdicts = []
    with trial.process(target) as engine:
        engine.load(hidden_weights(target.model, trial.seed))
        before, norm = engine.state(), None
        for step, rate in enumerate(stream.all_rates(4 + trial.seed % 2)):
            result = engine.step(stream.at(step), rate)
            after = engine.state()
            norm = float(result.grad_norm) if step == 0 else None
            verdicts.append(judged(before, after, rate, recipe, grad_norm=norm))
            release(trial.judge.device)
            before = after
        # late in training, as far as the state tells: a number of steps that no short run reaches
        before["step"] = before["step"]._replace(tensor=torch.tensor(1000 + trial.seed % 100_000))
        engine.restore(before)
        engine.step(stream.at(100), stream.rate(100))
        verdicts.append(judged(before, engine.state(), stream.rate(100), recipe))
    yield max(verdicts, key=lambda verdict: verdict.statistic or 0.0)


def errors(trial: Trial) -> Iterator[Verdict]:
    """G4 in fp32, and in the target's dtype; in fp8, which no reference has, against an engine known to be right. Half
    of the batches meet other weights, and one of those was seen before: a gradient that was remembered by input is
    wrong then."""
    target = trial.judge.gates_target
    for precision in dict.fromkeys(("fp32", target.precision.dtype)):
        stream, kept = trial.stream(target, f"G4.{precision}"), "fp32" if precision == "fp32" else "bf16"
        two = [hidden_weights(target.model, derive(trial.seed, "G4", precision, which)) for which in range(2)]
        count = trial.judge.effort.g4_batches
        numbers = [0 if i == count // 2 else i for i in range(count)]
        cases = [(two[2 * i // count], stream.at(n), stream.rate(i)) for i, n in enumerate(numbers)]
        with trial.process(target, precision=precision) as engine:
            mine = [gradients_of(engine, *case) for case in cases]
        measure = trial.judge.peer if precision == "fp8" else trial.judge.reference
        with trial.judge.trusted(measure, target, precision=precision) as reference:
            theirs = [gradients_of(reference, *case) for case in cases]
        pools = ErrorPool(), ErrorPool()
        for case, *found in zip(cases, mine, theirs, strict=True):
            due = gradients_due(oracle_step(target, *case, precision=kept, device=trial.judge.device))
            for pool, values in zip(pools, found, strict=True):
                add_to(pool, due, values, target.recipe.clip)
            due.clipped.clear()  # before the next: of a billion parameters 9 GB of a GPU
            release(trial.judge.device)
        verdict = g4(*pools, ratio=_g4_ratio(target, kept), sandboxed=trial.sandboxed)
        yield _renamed(verdict, f"G4.{precision}")
        if not verdict.passed:
            return


@dataclass(frozen=True)
class Training:
    """A short training run: the loss of each step, the mean held-out loss at its end, and the final masters."""

    losses: list[float]
    held_out: float
    weights: dict[str, Tensor]

    def weight_hash(self) -> str:
        return weight_hash({f"master/{name}": tensor for name, tensor in self.weights.items()})


def paired_training(trial: Trial) -> Iterator[Verdict]:
    gates = trial.judge.gates_target.gates
    references, *known = (_pool(trial, kind) for kind in ("reference", "known good", "textbook"))
    with trial.process(trial.judge.gates_target) as engine:
        mine = [_train(trial, engine, seed) for seed in trial.judge.pool]
    yield g5(
        [run.losses for run in mine],
        [run.losses for run in references],
        [[run.losses for run in runs] for runs in known],
        relative=gates.g5_relative,
        band_factor=gates.g5_band,
        seeds=gates.g5_seeds,
        sandboxed=trial.sandboxed,
    )


def hidden_training(trial: Trial) -> Iterator[Verdict]:
    """A seed of the candidate's own; two more, both of which it must pass, where that one may have led rounding far."""
    verdicts = [_hidden_training(trial, derive(trial.seed, "G6"))]
    if by_rounding(verdicts[0]):
        for more in (1, 2):
            verdicts.append(_hidden_training(trial, derive(trial.seed, "G6", more)))
            if not verdicts[-1].passed:
                break
    yield of_seeds(verdicts)


def _hidden_training(trial: Trial, seed: int) -> Verdict:
    """Twice in different processes; a known-good engine says how far rounding leads, over the judge's own seeds and
    over this one, for that differs: of ten seeds of a model of two layers nine led an honest engine 5e-6 to 4e-5 of
    training's way from the reference, the other one 2.9e-4."""
    judge, target = trial.judge, trial.judge.gates_target
    start, dtype = _start(target, seed), judge.target.precision.dtype
    references, known = _pool(trial, "reference"), _pool(trial, "peer")
    with judge.trusted(judge.reference, target) as reference:
        due = _train(trial, reference, seed)
    with judge.trusted(judge.peer, target, precision=dtype) as known_good:
        good = _train(trial, known_good, seed)
    apart_by = functools.partial(weight_distance, device=judge.device)
    budgets = [apart_by(good.weights, due.weights, start)] + [
        apart_by(pooled.weights, theirs.weights, _start(target, number))
        for pooled, theirs, number in zip(known, references, judge.pool, strict=True)
    ]
    budget = _DISTANCE_FACTOR * max(*budgets, _FLOOR[target.precision.kept])
    runs, band = [], None
    for one in (trial, trial.elsewhere):
        with one.process(target) as engine:
            runs.append(_train(trial, engine, seed))
            if not engine.deterministic:
                band = budget  # as far apart as engines are that differ in rounding alone
    first, second = runs
    hashes = first.weight_hash(), second.weight_hash()
    apart = 0.0 if hashes[0] == hashes[1] else apart_by(first.weights, second.weights, start)
    return g6(
        first.held_out,
        [due.held_out, *(run.held_out for run in references)],
        apart_by(first.weights, due.weights, start),
        Repeat(*hashes, apart, band),
        distance_budget=budget,
        sandboxed=trial.sandboxed,
    )


def speed(trial: Trial) -> Iterator[Verdict]:
    """The race at the training shape, and then the replay of some of its blocks: what was timed is what is checked."""
    judge, target = trial.judge, trial.judge.race_target
    stream = trial.stream(target, "G7")
    start = starting_state(target, initial_weights(target.model, derive(trial.seed, "G7")), judge.target.precision.kept)
    effort = judge.effort
    with judge.rival(trial.champion) as champion:
        began = time.monotonic()
        with trial.process(target) as engine:
            build = time.monotonic() - began
            # without a champion nothing is to be won, and a known-good engine may take ten times as long for a step
            pairs = effort.pairs if trial.champion is not None else min(effort.pairs, PAIRS)
            counts = {"blocks": pairs, "steps": effort.steps, "warm_up": effort.warm_up}
            run = race(champion, engine, start, stream, **counts, device=judge.device)
            trial.peak_bytes = engine.peak_memory()
    trial.keep_speed(run, {"candidate": build})
    # where a candidate is wrong from some step on, the last block shows it; elsewhere the one that was drawn may
    replays = []
    while run.replays:  # their states are most of this process's memory: each goes when it has been looked at
        replays.append(_check_replay(trial, run.replays.pop(0), stream))
    give_back()
    mine, theirs = run.candidate, run.champion
    replays.append(motion(mine.motions, theirs.motions, mine.answers, theirs.answers, sandboxed=trial.sandboxed))
    yield max(replays, key=lambda verdict: verdict.statistic or 0.0)
    times = run.times()
    yield g7(
        *times,
        roofline_seconds=judge.roofline_seconds,
        steps_per_block=run.steps_per_block,
        minimum=target.gates.g7_minimum,
        beat=trial.champion is not None,
        sandboxed=trial.sandboxed,
    )


def memory(trial: Trial) -> Iterator[Verdict]:
    """The peak during the race; against the target's budget, else all that this machine has."""
    if not trial.peak_bytes:
        target = trial.judge.race_target
        with trial.process(target) as engine:
            stream = trial.stream(target, "G8")
            engine.load(initial_weights(target.model, trial.seed))
            for step in range(2):
                engine.step(stream.at(step), stream.rate(step))
            trial.peak_bytes = engine.peak_memory()
    budget = trial.judge.target.hardware.memory_gib or _machine_gib(trial.judge.device)
    yield g8(trial.peak_bytes, budget, sandboxed=trial.sandboxed)


#: What runs for each gate's name.
GATES: dict[str, Callable[[Trial], Iterator[Verdict]]] = {
    "contract": contract,
    "G1": bits_of_one_step,
    "G2": bits_of_a_trajectory,
    "G3": layouts.across_ranks,
    "G4.update": updates,
    "G4": errors,
    "G5": paired_training,
    "G6": hidden_training,
    "G7": speed,
    "G8": memory,
    "G9": layouts.shipped_command,
}


def _check_replay(trial: Trial, block: Replay, stream: Stream) -> Verdict:
    """A block again on the reference and on a known-good engine, from the candidate's own state. One after the other:
    of a large model one of them fills a GPU."""

    def again(engine: EngineProcess) -> Outcome:
        engine.restore(block.before)
        found = [engine.step(stream.at(step), stream.rate(step)) for step in range(block.first, block.last)]
        return Outcome([float(step.loss) for step in found], [float(step.grad_norm) for step in found], engine.state())

    judge = trial.judge
    with judge.trusted(judge.reference, judge.plain_race_target) as reference:
        due = again(reference)
    with judge.trusted(judge.peer, judge.plain_race_target, precision=judge.target.precision.dtype) as known_good:
        good = again(known_good)
    recipe, steps = judge.target.recipe, block.last - block.first
    mine, theirs = (
        replay_distance(block.before, found, due, recipe, steps, judge.device)
        | step_distance(block.before, found, due, judge.device)
        for found in (block.outcome, good)
    )
    return replay(
        mine,
        theirs,
        precision=judge.target.precision.kept,
        steps=(block.first, block.last),
        sandboxed=trial.sandboxed,
    )


def _pool(trial: Trial, kind: str) -> list[Training]:
    """Training runs with the judge's own seeds, made once for all candidates."""
    judge = trial.judge
    modules = {
        "reference": judge.reference,
        "known good": judge.known_good,
        "textbook": judge.textbook,
        "peer": judge.peer,
    }
    if kind == "peer" and judge.peer == judge.known_good:
        kind = "known good"
    if kind not in judge.kept:
        precision = judge.target.precision.dtype if kind == "peer" else None
        with judge.trusted(modules[kind], judge.gates_target, precision=precision) as engine:
            runs = [_train(trial, engine, seed) for seed in judge.pool]
        # its losses alone are compared, and of a billion parameters each run's weights are 4 GB
        judge.kept[kind] = [replace(run, weights={}) for run in runs] if kind == "textbook" else runs
    return judge.kept[kind]


def _train(trial: Trial, engine: EngineProcess, seed: int) -> Training:
    target, data = trial.judge.gates_target, trial.judge.data
    stream = Stream(target, seed, data, warm_up=target.gates_warm_up)
    held_out = Stream(target, derive(trial.judge.pool[0], "held-out"), data)
    engine.load(_start(target, seed))
    steps = target.gates.g5_steps
    losses = [float(engine.step(stream.at(step), stream.rate(step)).loss) for step in range(steps)]
    unseen = [float(engine.loss(held_out.at(number))) for number in range(_HELD_OUT)]
    return Training(losses, sum(unseen) / len(unseen), masters(engine.state(("master",))))


def _start(target: Target, seed: int) -> dict[str, Tensor]:
    return initial_weights(target.model, derive(seed, "start"))


def _unequal(expected: dict[str, Tensor], state: dict[str, Any], when: str) -> Iterator[str]:
    for name, tensor in expected.items():
        found = difference(tensor, state[name].tensor)
        if found is not None:
            yield f"{when} {name} is not what it must be: {found}"


def _plain(state: State) -> dict[str, Tensor]:
    return {name: shard.tensor for name, shard in state.items()}


def _renamed(verdict: Verdict, gate: str) -> Verdict:
    return Verdict(**{**vars(verdict), "gate": gate})


def _machine_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
