"""SwiGLU (arXiv 2002.05202) in the epilogues of the products around it, by quack (the package quack-kernels).

    forward    gate_up = x · weightᵀ         act = silu(gate) * up
    backward   d_act = alpha * d_y · weight  d_gate_up and alpha * act, as in swiglu.py

Gates and ups alternate: row 2i of the weight [2F, D], and so column 2i of gate_up [T, 2F], is of gate i, the next of up
i, so that one thread of an epilogue holds both. In bf16; sums and SwiGLU are fp32 and round once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def gated_kernels() -> tuple[Callable, Callable, dict[str, Any]]:
    """Forward, backward, and how they run: the tile that was fastest at the GPU's power limit for both models measured.
    Raises ImportError, with the remedy, where the package is missing."""
    try:
        from quack.gemm_config import GemmConfig  # pyright: ignore
        from quack.gemm_interface import gemm_dgated, gemm_gated  # pyright: ignore
    except ImportError as error:
        raise ImportError(f"quack is missing ({error}): pip install 'forgetrain[hopper]'") from error
    tile = GemmConfig(tile_m=128, tile_n=192, pingpong=True, is_dynamic_persistent=False, cluster_m=2, cluster_n=1)
    return gemm_gated, gemm_dgated, {"activation": "swiglu", "config": tile, "dynamic_scheduler": False}


def gated_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, D] → gate_up [T, 2F] and act [T, F]."""
    forward, _, options = gated_kernels()
    gate_up, act = (x.new_empty(x.shape[0], width) for width in (weight.shape[0], weight.shape[0] // 2))
    forward(x, weight.t(), preact_out=gate_up, postact_out=act, **options)
    return gate_up, act


def gated_backward_(d_y: Tensor, weight: Tensor, gate_up: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Overwrites gate_up [T, 2F] with its gradient; returns it, and alpha * act [T, F], of which forward's need not be
    kept. weight: the product's behind SwiGLU, [D, F]."""
    _, backward, options = gated_kernels()
    act = d_y.new_empty(d_y.shape[0], weight.shape[1])
    scale = None if alpha == 1.0 else torch.full((d_y.shape[0],), alpha, dtype=torch.float32, device=d_y.device)
    backward(d_y, weight, gate_up, dx_out=gate_up, postact_out=act, colvec_scale=scale, **options)
    return gate_up, act
