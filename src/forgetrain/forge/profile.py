"""Where an engine's time goes, by op, beside what its hardware allows.

    profile = profile_engine(judge, Path("champion.py"))
    profile.top(5)                       # (("linear", 0.58), ("attention", 0.21), ...): shares of the step
    profile.gaps(target)[0].op           # the op that stands farthest from its roofline

The engine runs in the sandbox, as when it is judged. Shares come from torch's profiler in its own process, seconds from
steps that were clocked from outside without it. It hints where to look; no gate depends on it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from forgetrain.forge.search import pinned
from forgetrain.judge.hidden import Stream, draw_seed
from forgetrain.judge.runner import Judge
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.hardware import hardware_of
from forgetrain.spec.op_costs import op_costs
from forgetrain.spec.target import Target
from forgetrain.train.metrics import least_time, measured_gemm_rate

OTHER = "other"
WARM_UP, CLOCKED, PROFILED = 2, 3, 2
#: Words in names of functions, kernels and operators, and the op that they speak of; the first that fits decides.
_WORDS = (
    ("attention", "attention"),
    ("attn", "attention"),
    ("fmha", "attention"),
    ("flash", "attention"),
    ("rope", "rope"),
    ("turned", "rope"),
    ("swiglu", "swiglu"),
    ("silu", "swiglu"),
    ("entropy", "cross_entropy"),
    ("vocabulary", "cross_entropy"),
    ("embed", "embedding"),
    ("adam", "adamw"),
    ("clip", "clip"),
    ("norm_blocked", "clip"),
    ("grad_norm", "clip"),
    ("norm", "rmsnorm"),
    ("residual", "rmsnorm"),
    ("linear", "linear"),
    ("product", "linear"),
    ("gemm", "linear"),
    ("nvjet", "linear"),
    ("cutlass", "linear"),
    ("cublas", "linear"),
)
_OPERATORS = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::addmm_", "aten::matmul", "aten::linear"), "linear"),
    **dict.fromkeys(("aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::_softmax"), "attention"),
    **dict.fromkeys(("aten::index_select", "aten::embedding", "aten::index_add_"), "embedding"),
}


@dataclass(frozen=True)
class Gap:
    """seconds: what the op takes of a step; roofline: the least that it needs at the rates of this machine."""

    op: str
    seconds: float
    roofline: float

    @property
    def lost(self) -> float:
        return self.seconds - self.roofline


@dataclass(frozen=True)
class Profile:
    """step_seconds: of a step without the profiler. ops: seconds of each op in it. product_rate: FLOP/s of dense
    products in the target's dtype, bandwidth: bytes/s; on a CPU both measured beside the profile, else the table's.
    rows: the costliest places, (functions, operator, share of the step, calls in a step)."""

    step_seconds: float
    ops: dict[str, float]
    product_rate: float
    bandwidth: float
    rows: list[tuple[str, str, float, float]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def top(self, count: int) -> tuple[tuple[str, float], ...]:
        """The costliest ops and their shares of a step."""
        ranked = sorted(self.ops.items(), key=lambda item: -item[1])
        return tuple((op, seconds / self.step_seconds) for op, seconds in ranked[:count])

    def gaps(self, target: Target) -> list[Gap]:
        """Of the ops that have a roofline, the one that loses the most time to it first."""
        costs = op_costs(target.at_race_shape())
        gaps = [
            Gap(op, seconds, costs[op].seconds(self.product_rate, self.bandwidth))
            for op, seconds in self.ops.items()
            if op in costs
        ]
        return sorted(gaps, key=lambda gap: -gap.lost)


def read_profile(plain: Mapping[str, Any]) -> Profile:
    """What ``as_dict`` gave."""
    return Profile(**{**plain, "rows": [tuple(row) for row in plain["rows"]]})


def profile_engine(judge: Judge, file: Path) -> Profile:
    """Profiles an engine file at the race's shape.

    Raises:
        UserError: the engine failed.
    """
    target = judge.race_target
    stream = Stream(target, draw_seed(), judge.data)
    found: dict[tuple[str, str], tuple[float, int]] = {}
    with judge.rival(file) as engine:
        engine.load(initial_weights(target.model, target.recipe.seed))
        clocked = []
        for step in range(WARM_UP + CLOCKED):
            batch, rate = stream.at(step), stream.rate(step)
            began = time.perf_counter()
            engine.step(batch, rate)
            clocked.append(time.perf_counter() - began)
        for step in range(WARM_UP + CLOCKED, WARM_UP + CLOCKED + PROFILED):
            for functions, operator, seconds, calls in engine.profile(stream.at(step), stream.rate(step)):
                before = found.get((functions, operator), (0.0, 0))
                found[functions, operator] = before[0] + seconds, before[1] + calls
    return summarise(found, statistics.median(clocked[WARM_UP:]), _rates(target))


def summarise(
    found: Mapping[tuple[str, str], tuple[float, int]], step_seconds: float, rates: tuple[float, float]
) -> Profile:
    """From (functions, operator) → (seconds, calls) over the profiled steps."""
    whole = sum(seconds for seconds, _ in found.values()) or 1.0
    ops: dict[str, float] = {}
    for (functions, operator), (seconds, _) in found.items():
        op = op_of(functions, operator)
        ops[op] = ops.get(op, 0.0) + step_seconds * seconds / whole
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    rows = [(*key, seconds / whole, calls / PROFILED) for key, (seconds, calls) in ranked[:30]]
    return Profile(step_seconds, ops, *rates, rows)


def op_of(functions: str, operator: str) -> str:
    """The op that a place in an engine works for: the innermost function whose name says one decides, then the
    operator."""
    for name in [*reversed(functions.split("/")), operator if not functions else ""]:
        for word, op in _WORDS:
            if word in name.lower():
                return op
    return _OPERATORS.get(operator, OTHER)


def _rates(target: Target) -> tuple[float, float]:
    """FLOP/s and bytes/s of the target's hardware."""
    if target.hardware.device != "cpu":
        device = hardware_of(target.hardware)
        return device.peak(target.precision.dtype), device.bandwidth
    dtype = torch.bfloat16 if target.precision.kept == "bf16" else torch.float32
    with pinned(target.hardware):
        return measured_gemm_rate(dtype), _copy_rate()


def _copy_rate(size: int = 2**24, seconds: float = 0.2) -> float:
    """Bytes/s, read and written, of a copy that no cache holds: the best of those in ``seconds``."""
    source, copy = torch.ones(size), torch.empty(size)
    return 8 * size / least_time(lambda: copy.copy_(source), seconds)
