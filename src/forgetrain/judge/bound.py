"""The least time of a step, below which G7 refuses a clocked one: what it says it computed was not.

A GPU's is its roofline. A CPU's peak nobody publishes, and another machine's rate bounds nothing here, so a product's
rate is measured now; it bounds with a margin, for clocks rise, and torch.mm need not have the fastest kernels (an
engine's products ran at 1.25 times its rate on one processor). Of bf16 it is fp32's where torch multiplies bf16 no
faster, as on processors without instructions for it: a kernel that widens it is a hundred times as fast there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from forgetrain.errors import UserError
from forgetrain.spec.estimate import flops_per_token, roofline
from forgetrain.spec.hardware import hardware_of
from forgetrain.spec.target import Target
from forgetrain.train.metrics import measured_gemm_rate

#: How much faster than a product measured here any honest engine's arithmetic may be.
MARGIN = 2.0


def least_step_seconds(target: Target, say: Callable[[str], None]) -> float:
    """Seconds of a step of G7's race; 0, and a line that says so, on hardware that the table lacks. Ranks that share
    layers or rows have a device each, or on a CPU their ``threads_of``."""
    race = target.at_race_shape()
    hardware = target.hardware
    ranks = max(target.parallel.sharing, hardware.count)
    try:
        if hardware_of(hardware).is_bound:
            return roofline(race).bound * hardware.count / ranks
    except UserError as error:
        say(f"no roofline: {error}")
        return 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(hardware.threads_of(ranks))
    rate = measured_gemm_rate(torch.float32 if target.precision.dtype == "fp32" else torch.bfloat16)
    torch.set_num_threads(before)
    flops, recipe = flops_per_token(race.model, race.recipe.sequence_length), race.recipe
    tokens = recipe.batch_size * recipe.sequence_length
    return tokens * (flops.matmul + flops.attention_causal) / (MARGIN * rate * ranks)
