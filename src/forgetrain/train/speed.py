"""How fast a run is, and what share of the hardware that is, in both conventions of model FLOPs utilisation.

Causal counts the half of attention that a causal mask leaves (Megatron's convention), full counts all of it
(torchtitan's). On a CPU, whose peak nobody publishes, the shares are of a matrix product's rate measured at the start.
Under fp8 products have two peaks, and a share of either would mislead: the time that products and causal attention take
at their own peaks is set against the time that was taken, as ``floor_share``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from forgetrain.spec.estimate import mfu, roofline
from forgetrain.spec.hardware import hardware_of
from forgetrain.spec.stages import Stage, stage_at, tokens_before
from forgetrain.spec.target import Target
from forgetrain.train.metrics import measured_gemm_rate
from forgetrain.train.world import World

#: The rate shown is that of about so many last steps.
WINDOW = 20


class Speed:
    def __init__(self, target: Target, world: World, stages: Sequence[Stage], offset: int):
        """offset: by how many batches the data, and so the stages, are ahead of the steps."""
        self.stages, self.offset = stages, offset
        self.on_cpu = world.device == "cpu"
        self.target = target
        self.floor = target.precision.dtype == "fp8" and not self.on_cpu
        if self.on_cpu:
            dtype = torch.float32 if target.precision.dtype == "fp32" else torch.bfloat16
            peak = measured_gemm_rate(dtype)
        else:
            peak = hardware_of(target.hardware).peak(target.precision.dtype)
        self.peak = peak * world.size
        self.model = target.model
        self._seen: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)

    def tokens_per_second(self, step: int, seconds: float) -> float:
        """Over the last steps of this stage; ``seconds`` spent in steps until the end of ``step``."""
        if not self._seen:
            self._seen.append((step - 1, 0.0))
        if self._stage(self._seen[-1][0] + 1) is not self._stage(self._seen[0][0] + 1):
            self._seen = deque([self._seen[-1]], maxlen=WINDOW + 1)  # the stage before had another shape
        self._seen.append((step, seconds))
        (first, began), (last, ended) = self._seen[0], self._seen[-1]
        tokens = tokens_before(self.stages, last + self.offset) - tokens_before(self.stages, first + self.offset)
        return tokens / max(ended - began, 1e-9)

    def length_at(self, step: int) -> int:
        """The sequence length of the run's ``step``-th step."""
        return self._stage(step).sequence_length

    def _stage(self, step: int) -> Stage:
        return stage_at(self.stages, step - 1 + self.offset)

    def shares(self, rate: float, length: int) -> dict[str, float]:
        """At ``rate`` tokens a second in sequences of ``length``: of the GPUs' peak (``mfu_*``), of the measured
        product (``gemm_share_*``), or of the floor (``floor_share``)."""
        if self.floor:
            recipe = self.target.recipe.model_copy(update={"sequence_length": length})
            roof = roofline(self.target.model_copy(update={"recipe": recipe}))
            seconds = (roof.products + roof.attention) / (recipe.batch_size * length)
            return {"floor_share": round(rate * seconds, 4)}
        name = "gemm_share" if self.on_cpu else "mfu"
        shares = mfu(rate, self.model, length, peak=self.peak)
        return {f"{name}_{kind}": round(share, 4) for kind, share in shares.items()}

    def text(self, rate: float, shares: dict[str, float]) -> str:
        if self.floor:
            return f"{rate:,.0f} tok/s  {shares['floor_share']:.0%} of the floor"
        causal, full = shares.values()
        of = "of GEMM" if self.on_cpu else "MFU"
        return f"{rate:,.0f} tok/s  {causal:.0%}/{full:.0%} {of} (causal/full)"
