"""SwiGLU (arXiv 2002.05202) in the epilogue of the product before it, by quack (the package quack-kernels).

    gate_up = x · weightᵀ        act = silu(gate) * up

Gates and ups alternate: row 2i of the weight [2F, D], and so column 2i of gate_up [T, 2F], is of gate i, the next of up
i, so that one thread of the epilogue holds both. In bf16; the sum and SwiGLU are fp32 and round once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor


@functools.cache
def gated_kernel() -> tuple[Callable, dict[str, Any]]:
    """The product, and how it runs: with the tile that was fastest at the GPU's power limit for both models measured.
    Raises ImportError, with the remedy, where the package is missing."""
    try:
        from quack.gemm_config import GemmConfig  # pyright: ignore
        from quack.gemm_interface import gemm_gated  # pyright: ignore
    except ImportError as error:
        raise ImportError(f"quack is missing ({error}): pip install 'forgetrain[hopper]'") from error
    tile = GemmConfig(tile_m=128, tile_n=192, pingpong=True, is_dynamic_persistent=False, cluster_m=2, cluster_n=1)
    return gemm_gated, {"activation": "swiglu", "config": tile, "dynamic_scheduler": False}


def gated_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, D] → gate_up [T, 2F] and act [T, F]."""
    product, options = gated_kernel()
    gate_up, act = (x.new_empty(x.shape[0], width) for width in (weight.shape[0], weight.shape[0] // 2))
    product(x, weight.t(), preact_out=gate_up, postact_out=act, **options)
    return gate_up, act
