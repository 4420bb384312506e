"""Driving an engine through the contract and keeping what gates compare. The same functions drive the candidate, the
reference and known-good engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from forgetrain import memory
from forgetrain.engine.contract import Shard
from forgetrain.engine.process import EngineProcess
from forgetrain.gates.g2 import StepRecord
from forgetrain.gates.g4 import ErrorPool
from forgetrain.judge.hidden import Stream
from forgetrain.numerics.oracle import OracleStep
from forgetrain.spec.moments import average_decay, state_shapes
from forgetrain.spec.target import Target

State = dict[str, Shard]
#: Relative errors of a loss and of a gradient norm, by dtype: for what is grossly wrong, the rest is G4's to find.
SCALARS = {"fp32": {"loss": 1e-3, "grad_norm": 5e-3}, "bf16": {"loss": 2e-2, "grad_norm": 5e-2}}


def trajectory(
    engine: EngineProcess, stream: Stream, first: int, last: int, *, hashed: bool = True
) -> Iterator[StepRecord]:
    """Steps ``first`` to ``last`` - 1 of a stream, each batch sent only when the one before it has been answered.
    ``hashed``: with the weights' hashes, which of a billion parameters take seconds each."""
    for step in range(first, last):
        result = engine.step(stream.at(step), stream.rate(step))
        digest = engine.weight_hash() if hashed else ""
        yield StepRecord(float(result.loss), float(result.grad_norm), bool(result.applied), digest)


def from_weights(
    engine: EngineProcess, weights: Mapping[str, Tensor], stream: Stream, steps: int, *, hashed: bool = True
) -> list[StepRecord]:
    """The first steps of a stream, after loading ``weights``."""
    engine.load(weights)
    return list(trajectory(engine, stream, 0, steps, hashed=hashed))


class Gradients(NamedTuple):
    """clipped: named as taps, an engine's in fp32, the oracle's in float64; norm: before clipping, an engine's as the
    step returned it."""

    clipped: list[tuple[str, Tensor]]
    norm: float


def gradients_of(engine: EngineProcess, weights: Mapping[str, Tensor], batch: Any, lr: float) -> Gradients:
    """The gradients of a step from zero moments; the first moments hold them: exp_avg / (1 - its decay)."""
    engine.load(weights)
    norm = float(engine.step(batch, lr).grad_norm)
    recipe, prefix = engine.target.recipe, "exp_avg/"
    moments = {key.removeprefix(prefix): shard.tensor for key, shard in engine.state(("exp_avg",)).items()}
    clipped = [(f"{name}#clipped", m.div_(1 - average_decay(recipe, name, m.dim()))) for name, m in moments.items()]
    return Gradients(clipped, norm)


def gradients_due(step: OracleStep) -> Gradients:
    """The oracle's, without the rest of its step, which of a billion parameters is 16 GB."""
    return Gradients([(f"{name}#clipped", grad) for name, grad in step.clipped.items()], float(step.grad_norm))


def add_to(pool: ErrorPool, due: Gradients, found: Gradients, clip: float) -> None:
    """``clip``: the recipe's. A norm below it clips nothing, so it has no error that gradients could have."""
    pool.add_batch(due.clipped, found.clipped, max(found.norm, clip) / max(due.norm, clip) - 1)


def masters(state: State) -> dict[str, Tensor]:
    prefix = "master/"
    return {key.removeprefix(prefix): shard.tensor for key, shard in state.items() if key.startswith(prefix)}


def expected_start(target: Target, weights: Mapping[str, Tensor], precision: str) -> dict[str, Tensor]:
    """The state right after ``load``: rounded masters, zero moments, no step."""
    # a zero for each whole tensor: of a billion parameters they would take 9 GB
    state = {name: torch.zeros(()).expand(shape) for name, shape in state_shapes(target).items()}
    state["step"] = torch.tensor(0)
    for name, weight in weights.items():
        state[f"master/{name}"] = weight
        if precision == "bf16":
            rounded = memory.empty(weight.shape, torch.bfloat16).copy_(weight)
            state[f"master/{name}"] = memory.empty(weight.shape).copy_(rounded)
    return state


def starting_state(target: Target, weights: Mapping[str, Tensor], precision: str) -> State:
    """The same as an engine's ``state`` has it."""
    return {
        name: Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim())
        for name, tensor in expected_start(target, weights, precision).items()
    }
