"""The evidence of the gates that need ranks: G3 and G9, on the layout that ``[parallel]`` and ``gates.ranks`` name.

layout_of(target, ranks=4)      # "2 data ranks x 2 tensor ranks"
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from forgetrain.data.folder import open_data
from forgetrain.data.loader import Loader
from forgetrain.engine.process import EngineProcess
from forgetrain.errors import UserError
from forgetrain.gates.g2 import StepRecord
from forgetrain.gates.g3 import g3, g3_near
from forgetrain.gates.g9 import TrainingRun, g9
from forgetrain.gates.replay import Outcome, replay_distance
from forgetrain.gates.update import update
from forgetrain.gates.verdict import Verdict
from forgetrain.judge.command import ShippedCommand
from forgetrain.judge.evidence import SCALARS, State, from_weights, trajectory
from forgetrain.judge.hidden import Stream, derive
from forgetrain.judge.scratch import folder_in
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.schedule import learning_rate
from forgetrain.spec.target import Target

if TYPE_CHECKING:
    from forgetrain.judge.runner import Judge, Trial

#: Steps of G9's runs, how many lie between two checkpoints (of a billion parameters each has 13 GB, and a run of the
#: command lasts as long as they take), and over how many its rate falls.
_COMMAND_STEPS, _COMMAND_CHECKPOINT, _COMMAND_DECAY = 12, 4, 4
#: What of a state G3 compares: weighted sums of gradients. What they do to the rest is G4.update's.
_COMPARED = ("exp_avg",)


def layout_of(target: Target, ranks: int) -> str:
    """In words."""
    sizes = {
        "data": ranks // target.parallel.sharing,
        "context": target.parallel.context,
        "tensor": target.parallel.tensor,
    }
    return " x ".join(f"{n} {kind} ranks" for kind, n in sizes.items() if n > 1) or "one rank"


def _ranks(target: Target) -> int:
    """Two data ranks where rows divide, unless the target says otherwise."""
    sharing = target.parallel.sharing
    return target.gates.ranks or (sharing if sharing > 1 or target.recipe.batch_size % 2 else 2)


def _ranks_with_devices(judge: Judge) -> int:
    """The same where each rank has a GPU of its own; one where there are too few and the layout is nobody's wish."""
    target = judge.gates_target
    ranks = _ranks(target)
    if judge.device == "cpu" or torch.cuda.device_count() >= ranks:
        return ranks
    if target.gates.ranks or target.parallel.sharing > 1:
        raise UserError(
            f"needs {ranks} GPUs, there are {torch.cuda.device_count()}",
            key="gates.ranks" if target.gates.ranks else "parallel",
            value=ranks,
            remedy="judge where they are, or on a CPU with --set hardware.name=cpu",
        )
    return 1


def across_ranks(trial: Trial) -> Iterator[Verdict]:
    """G3: bits, of a candidate that claims the reference's, where the layout has them; else distances.

    A sum over two ranks has one value. One over four has several, and which it is depends on where in its bucket an
    element lies: an aligned engine's losses and norm were the reference's there, and its weights were not.
    """
    if trial.bitwise and _ranks(trial.judge.gates_target) <= 2:
        yield _bits(trial)
        return
    # in the exact mode first, where rounding hides nothing; then what is particular to the target's dtype
    verdict, dtype = _near(trial, "fp32"), trial.judge.gates_target.precision.dtype
    yield verdict if dtype == "fp32" or not verdict.passed else _near(trial, dtype)


@dataclass(frozen=True)
class _Training:
    """An engine's steps, what it said of a batch that it evaluated after the first, and its state after the last."""

    records: list[StepRecord]
    evaluation: float
    after: State


@dataclass(frozen=True)
class _Run:
    """The candidate on so many ranks: before, as loaded; its training; and the steps after the first again, in fresh
    processes that began with the state after it and evaluated nothing, so that an evaluation that trains is found; and
    of an engine that does not repeat itself what G4.update says of the first of those."""

    before: State
    training: _Training
    resumed: list[StepRecord]
    update: Verdict | None
    deterministic: bool


def _go_on(
    engine: EngineProcess, first: list[StepRecord], stream: Stream, steps: int, *, hashed: bool = True
) -> tuple[list[StepRecord], float]:
    """After the first step an evaluation and the other steps -> all records, and the evaluation."""
    evaluation = float(engine.loss(stream.at(steps)))
    return [*first, *trajectory(engine, stream, 1, steps, hashed=hashed)], evaluation


def _run(trial: Trial, stream: Stream, weights: dict[str, Tensor], **options: Any) -> _Run:
    """``options`` are ``Judge.process``'s: ranks, precision."""
    target, steps = trial.judge.gates_target, trial.judge.effort.g3_steps
    with trial.apart() as apart:  # what is not in the state must not come by way of a folder
        with trial.process(target, **options) as engine:
            engine.load(weights)
            before = engine.state(_COMPARED)
            first = list(trajectory(engine, stream, 0, 1))
            state = engine.state()
            training = _Training(*_go_on(engine, first, stream, steps), engine.state(_COMPARED))
            deterministic = engine.deterministic
        with apart.process(target, **options) as engine:
            engine.restore(state)
            resumed, verdict = list(trajectory(engine, stream, 1, 2)), None
            if not deterministic:
                after, rate = engine.state(), stream.rate(1)
                verdict = update(state, after, rate, target.recipe, device=trial.judge.device)
                del after
            resumed += trajectory(engine, stream, 2, steps)
    return _Run(before, training, resumed, verdict, deterministic)


def _bits(trial: Trial) -> Verdict:
    target, steps = trial.judge.gates_target, trial.judge.effort.g3_steps
    stream, ranks = trial.stream(target, "G3"), _ranks(target)
    weights = initial_weights(target.model, derive(trial.seed, "G3"))
    with trial.judge.trusted(trial.judge.reference, target, ranks=ranks) as reference:
        due, evaluation = _go_on(reference, from_weights(reference, weights, stream, 1), stream, steps)
    found = _run(trial, stream, weights, ranks=ranks)
    alone = found if ranks == 1 else _run(trial, stream, weights, ranks=1)
    return g3(
        due,
        found.training.records,
        alone.training.records[1:],
        alone.resumed,
        ranks=ranks,
        restarted_ranks=None if ranks == 1 else (found.training.records[1:], found.resumed),
        evaluations=(evaluation, found.training.evaluation),
        sandboxed=trial.sandboxed,
    )


def _near(trial: Trial, precision: str) -> Verdict:
    judge, target = trial.judge, trial.judge.gates_target
    ranks = _ranks_with_devices(judge)
    stream = trial.stream(target, "G3", warm_up=target.gates_warm_up)
    weights = initial_weights(target.model, derive(trial.seed, "G3"))

    def trained(module: str | Path, ranks: int, precision: str) -> _Training:
        with judge.trusted(module, target, ranks=ranks, precision=precision) as engine:
            first = from_weights(engine, weights, stream, 1, hashed=False)
            return _Training(
                *_go_on(engine, first, stream, judge.effort.g3_steps, hashed=False), engine.state(_COMPARED)
            )

    kept = target.precision.kept if precision == target.precision.dtype else precision
    due = trained(judge.reference, ranks // target.parallel.sharing, kept)
    known_good = trained(judge.peer, 1, precision)
    run = _run(trial, stream, weights, ranks=ranks, precision=precision)
    layout = layout_of(target, ranks)
    return g3_near(
        _distances(target, run.before, run.training, due, judge.device),
        _distances(target, run.before, known_good, due, judge.device),
        run.training.records[1:],
        run.resumed,
        update=run.update,
        layout=layout if precision == target.precision.dtype else f"{layout} in {precision}",
        precision=kept,
        tolerance=None if run.deterministic else SCALARS[kept]["loss"],
        sandboxed=trial.sandboxed,
    )


def _distances(target: Target, before: State, found: _Training, due: _Training, device: str) -> dict[str, float]:
    """Of losses, gradient norms, the evaluation, and what the steps left in the moments, by kind of parameter."""
    apart = abs(found.evaluation - due.evaluation) / due.evaluation
    mine, theirs = (
        Outcome([step.loss for step in run.records], [step.grad_norm for step in run.records], run.after)
        for run in (found, due)
    )
    distances = replay_distance(before, mine, theirs, target.recipe, len(due.records), device)
    return distances | {"evaluation": apart if math.isfinite(apart) else math.inf}


def shipped_command(trial: Trial) -> Iterator[Verdict]:
    """``forgetrain train`` once through, and once killed and resumed, against the same steps driven from here. It needs
    tokens: without a data folder there is no verdict."""
    judge = trial.judge
    if judge.data is None:
        return
    target = command_target(judge.gates_target)
    ranks = _ranks_with_devices(judge)
    rows = target.recipe.micro_batch_size * ranks // target.parallel.sharing
    if target.recipe.batch_size % rows and not target.gates.ranks:
        ranks = target.parallel.sharing
    loader = Loader(open_data(judge.data, target, verify=False), target)
    steps = target.recipe.steps - 1
    with trial.process(target, ranks=ranks) as engine:
        engine.load(initial_weights(target.model, target.recipe.seed))
        rates = [learning_rate(target.recipe, step) for step in range(steps)]
        due = [float(engine.step(loader.batch_at(step), rate).loss) for step, rate in enumerate(rates)]
        digest, deterministic = engine.weight_hash(), engine.deterministic
    tolerance = None if deterministic else SCALARS[target.precision.kept]["loss"]
    found: dict[str, TrainingRun] = {}
    last = ["--stop-after", str(steps)]  # so that there is no evaluation of all held-out tokens
    # none of what the judge's own run left, and for the resumed one nothing of the runs before
    other = trial.elsewhere
    options: dict[str, Any] = {"ranks": ranks, "timeout": judge.effort.timeout, "cache": other.box.cache}
    with other.apart() as apart:
        for name in ("once through", "killed and resumed"):
            with folder_in(judge.scratch) as folder:
                command = ShippedCommand(trial.file, target, judge.data, folder, **options)
                problem = command.run(*last, kill_at=None if name == "once through" else _COMMAND_CHECKPOINT)
                if problem is None and name != "once through":
                    command.box = command.box.with_cache(apart.box.cache)
                    problem = command.run(*last, "--resume")
                found[name] = command.found(problem)
    yield g9(due, digest, found, layout=layout_of(target, ranks), tolerance=tolerance, sandboxed=trial.sandboxed)


def command_target(gates: Target) -> Target:
    """A short run at the gates' shape with a few checkpoints; one step more than is taken. Its rates rise and fall, and
    rise no faster than in the gates' trainings."""
    rise = _COMMAND_STEPS + 1 - _COMMAND_DECAY
    share = min(1.0, rise / gates.gates_warm_up)
    recipe = {"steps": _COMMAND_STEPS + 1, "warmup_steps": rise, "decay_steps": _COMMAND_DECAY}
    recipe |= {"lr": gates.recipe.lr * share, "min_lr": gates.recipe.min_lr * share}
    train = {
        "checkpoint_every": _COMMAND_CHECKPOINT,
        "keep_last": 2,
        "keep_every": 0,
        "eval_every": 100,
        "log_every": 1,
    }
    train |= {"deadline": None, "wandb": None}
    return gates.model_copy(
        update={"recipe": gates.recipe.model_copy(update=recipe), "train": gates.train.model_copy(update=train)}
    )
