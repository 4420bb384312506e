"""How fast a run is, and what share of the hardware that is, in both conventions of model FLOPs utilisation.

Causal counts the half of attention that a causal mask leaves (Megatron's convention), full counts all of it
(torchtitan's). On a CPU, whose peak nobody publishes, the shares are of a matrix product's rate measured at the start.
"""

from __future__ import annotations

from collections import deque

import torch

from forgetrain.spec.estimate import mfu
from forgetrain.spec.hardware import hardware_of
from forgetrain.spec.target import Target
from forgetrain.train.metrics import measured_gemm_rate
from forgetrain.train.world import World

#: The rate shown is that of about so many last steps.
WINDOW = 20


class Speed:
    def __init__(self, target: Target, world: World):
        recipe = target.recipe
        self.tokens_a_step = recipe.batch_size * recipe.sequence_length
        self.on_cpu = world.device == "cpu"
        if self.on_cpu:
            dtype = torch.float32 if target.precision.dtype == "fp32" else torch.bfloat16
            peak = measured_gemm_rate(dtype)
        else:
            peak = hardware_of(target.hardware).peak(target.precision.dtype)
        self.peak = peak * world.size
        self.model, self.length = target.model, recipe.sequence_length
        self._seen: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)

    def tokens_per_second(self, step: int, seconds: float) -> float:
        """Over the last steps; ``seconds`` spent in steps until the end of ``step``."""
        if not self._seen:
            self._seen.append((step - 1, 0.0))
        self._seen.append((step, seconds))
        (first, began), (last, ended) = self._seen[0], self._seen[-1]
        return (last - first) * self.tokens_a_step / max(ended - began, 1e-9)

    def shares(self, rate: float) -> dict[str, float]:
        """At ``rate`` tokens a second: of the GPUs' peak (``mfu_*``) or of the measured product (``gemm_share_*``)."""
        name = "gemm_share" if self.on_cpu else "mfu"
        shares = mfu(rate, self.model, self.length, peak=self.peak)
        return {f"{name}_{kind}": round(share, 4) for kind, share in shares.items()}

    def text(self, rate: float) -> str:
        causal, full = self.shares(rate).values()
        of = "of GEMM" if self.on_cpu else "MFU"
        return f"{rate:,.0f} tok/s  {causal:.0%}/{full:.0%} {of} (causal/full)"
