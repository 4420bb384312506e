"""What one step of the reference looked like, tensor by tensor, and how an engine's own step is laid beside it.

    truth = record_truth(reference, target, "golden batch", Start(weights=weights), batch, lr)
    verdict = g1(truth.stream(), observe(engine, truth), target.model)

The names and their order are ``gates.g1.evidence_names``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from forgetrain.engine.contract import Batch, Engine
from forgetrain.gates.g1 import evidence_names
from forgetrain.spec.target import Target


@dataclass(frozen=True)
class Start:
    """Where a step begins: from fresh ``weights``, or from a whole ``state`` in the middle of a run."""

    weights: Mapping[str, Tensor] | None = None
    state: Mapping[str, Any] | None = None

    def put(self, engine: Any) -> None:
        if self.state is not None:
            engine.restore(self.state)
        else:
            engine.load(self.weights)


@dataclass(frozen=True)
class Truth:
    """tensors: everything the reference's step showed; a mapping that reads from disk when asked is fine.
    names: the order in which they are compared. title: what a person calls this step."""

    target: Target
    title: str
    start: Start
    batch: Batch
    lr: float
    tensors: Mapping[str, Tensor]
    names: tuple[str, ...]

    def on(self, device: str) -> Truth:
        """The same step with its batch on a device, for an engine of this process; an engine's own process moves it."""
        return replace(self, batch=Batch(*(tensor.to(device) for tensor in self.batch)))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, self.tensors[name]


def ordered_names(target: Target, available: Mapping[str, Any]) -> tuple[str, ...]:
    """The evidence's names, in order, as far as a record has them."""
    micro_batches = -(-target.recipe.batch_size // target.recipe.micro_batch_size)
    return tuple(name for name in evidence_names(target.model, micro_batches) if name in available)


def record_truth(engine: Engine, target: Target, title: str, start: Start, batch: Batch, lr: float) -> Truth:
    """Runs the reference's probe and step, and keeps what it shows in memory."""
    empty = Truth(target, title, start, batch, lr, {}, ())
    seen = {name: tensor.cpu().clone() for name, tensor in observe(engine, empty)}
    return Truth(target, title, start, batch, lr, seen, ordered_names(target, seen))


def observe(engine: Engine, truth: Truth) -> Iterator[tuple[str, Tensor]]:
    """An engine's taps, results and state for the truth's step; only names that the truth has, if it has any."""
    truth.start.put(engine)
    wanted = frozenset(truth.names)
    for name, tensor in engine.probe(truth.batch):
        if not wanted or name in wanted or "#" not in name:
            yield name, tensor
    yield from step_and_state(engine, truth)


def show(engine: Any, truth: Truth, see: Callable[[str, Tensor], None]) -> None:
    """The same, for an engine whose taps can be watched as they are computed: ``see`` raises to end the step."""
    truth.start.put(engine)
    wanted = frozenset(truth.names)
    engine.watch(truth.batch, lambda name, tensor: see(name, tensor.contiguous()) if name in wanted else None)
    for name, tensor in step_and_state(engine, truth):
        see(name, tensor)


def step_and_state(engine: Engine, truth: Truth) -> Iterator[tuple[str, Tensor]]:
    """One step's results and the state after it, in the evidence's order."""
    result = engine.step(truth.batch, truth.lr)
    yield "step.loss", torch.as_tensor(result.loss).detach()
    yield "step.grad_norm", torch.as_tensor(result.grad_norm).detach()
    state = engine.state()
    for name in evidence_names(truth.target.model, 0):
        if name in state:
            yield name, state[name].tensor
