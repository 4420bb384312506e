"""G1: after one step from the same weights on the same batch, everything is bit for bit the reference's.

Evidence is two streams of (name, tensor) in the order of ``evidence_names``: the taps of one probe in topological
order, then the step's loss and gradient norm, then the state. The first name that differs is where the computation
leaves the reference's, since everything before it is equal. Streams are read in step, one tensor of each at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forgetrain.gates.verdict import Verdict
from forgetrain.numerics.compare import Difference, difference
from forgetrain.spec.model import Model
from forgetrain.spec.taps import op_of, tap_names

_RESULTS = ("step.loss", "step.grad_norm")
#: Kinds of state in the order in which an update computes them.
_STATE = ("exp_avg", "exp_avg_sq", "master")


@dataclass(frozen=True)
class Divergence:
    """The first name at which two streams part. position: how many names before it are equal. problem: in words, when
    it is not a matter of bits: a missing name, a wrong shape or type, a value that is not finite."""

    tap: str
    op: str
    layer: int | None
    position: int
    difference: Difference | None
    problem: str | None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        what = self.problem if self.problem is not None else str(self.difference)
        return f"{self.tap} (op {self.op}{layer}): {what}"

    def as_dict(self) -> dict[str, Any]:
        bits = None if self.difference is None else self.difference.as_dict()
        return {**vars(self), "difference": bits}


def evidence_names(model: Model, micro_batches: int) -> list[str]:
    """Names of the whole evidence in order: taps, results of the step, moments, master weights, the step's number."""
    state = [f"{kind}/{name}" for kind in _STATE for name in model.parameter_shapes()]
    return [*tap_names(model, micro_batches), *_RESULTS, *state, "step"]


def evidence_op(name: str, model: Model) -> str:
    """The op to suspect first when the evidence of this name differs."""
    if name == "step.loss":
        return "cross_entropy"
    if name == "step.grad_norm":
        return "clip"
    if name == "step" or name.startswith(tuple(kind + "/" for kind in _STATE)):
        return "adamw"
    try:
        return op_of(name, model)
    except KeyError:
        return "unknown"


def g1(divergence: Divergence | None, equal: int, *, sandboxed: bool = False) -> Verdict:
    """Takes what ``first_divergence`` found. Passed when nothing differs and there was something to compare.

    ``statistic`` is the number of tensors that are equal before the first difference.
    """
    if divergence is not None:
        return Verdict(
            "G1",
            False,
            equal,
            first_divergence=divergence.tap,
            detail={"divergence": divergence.as_dict()},
            explanation=f"{equal} tensors equal the reference bit for bit; the first that differs is {divergence}",
            sandboxed=sandboxed,
        )
    text = f"all {equal} tensors of one step (taps, loss, norm, state) equal the reference bit for bit"
    if not equal:
        text = "there is no evidence: nothing was compared"
    return Verdict("G1", equal > 0, equal, explanation=text, sandboxed=sandboxed)


class Comparison:
    """Compares values as they come with the expected stream; for engines that show their taps one by one."""

    def __init__(self, expected: Iterable[tuple[str, Tensor]], model: Model):
        self._expected, self._model = iter(expected), model
        self.equal = 0

    def see(self, name: str, tensor: Tensor) -> Divergence | None:
        """The next value; returns what is wrong with it, after which nothing more may be shown."""
        name_due, due = next(self._expected, (None, tensor))
        if name_due is None:
            return self._divergence(name, problem="is more than the reference has")
        if name != name_due:
            return self._divergence(name_due, problem=f"is due here, but the engine yields {name}")
        differs = difference(due, tensor)
        if differs is not None:
            return self._divergence(name, differs, _problem(due, tensor))
        self.equal += 1
        return None

    def end(self) -> Divergence | None:
        """No more values will come."""
        name, _ = next(self._expected, (None, None))
        return None if name is None else self._divergence(name, problem="is missing: the engine yields no more")

    def _divergence(self, name: str, differs: Difference | None = None, problem: str | None = None) -> Divergence:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        number = None if layer is None else int(layer.group(1))
        return Divergence(name, evidence_op(name, self._model), number, self.equal, differs, problem)


def first_divergence(
    expected: Iterable[tuple[str, Tensor]], actual: Iterable[tuple[str, Tensor]], model: Model
) -> tuple[Divergence | None, int]:
    """Reads both streams until they part. Returns None when they end together, all equal; and how many were equal."""
    comparison = Comparison(expected, model)
    for name, tensor in actual:
        divergence = comparison.see(name, tensor)
        if divergence is not None:
            return divergence, comparison.equal
    return comparison.end(), comparison.equal


def _problem(expected: Tensor, actual: Tensor) -> str | None:
    """What is wrong in kind and not in bits, or None."""
    if expected.shape != actual.shape:
        return f"has shape {list(actual.shape)}, the reference {list(expected.shape)}"
    if expected.dtype != actual.dtype:
        kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (actual, expected)]
        return f"is {kinds[0]}, the reference {kinds[1]}"
    if actual.is_floating_point() and bool(torch.isfinite(expected).all()):
        wrong = ~torch.isfinite(actual)
        if bool(wrong.any()):
            first = tuple(int(i) for i in wrong.nonzero()[0]) if actual.dim() else ()
            here, there = actual[first].item(), expected[first].item()
            count = f"{int(wrong.sum())} of {actual.numel()} values are not finite"
            return f"{count}; first at {list(first)}: {here}, the reference has {there!r}"
    return None
