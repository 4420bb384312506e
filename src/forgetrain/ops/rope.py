"""Rotary position embedding (arXiv 2104.09864) in the half-split layout of Llama: pair i is (x[i], x[i + K/2]).

tables(positions_NS int64, head_dim, theta) -> (cos_NSK, sin_NSK) in fp32, the angles of a pair at both of its places;
forward(x_NSHK, cos_NSK, sin_NSK) -> x rotated, in x's dtype; backward -> d_x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forgetrain.ops.variant import Variant
from forgetrain.ops.vjp import pull, record


def rope_tables_textbook_forward(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Angles position · theta^(-2i/K), formed in float64 and rounded once."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[..., None].double() * torch.pow(theta, -exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().float(), angles.sin().float()


def rope_tables_fp32_forward(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Angles in fp32 from 1 / theta^(2i/K), formed where the positions are."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / (theta**exponents))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rope_tables_host_forward(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """The same, but 1 / theta^(2i/K) is formed on the host, whose powers differ from a GPU's in the last bit:
    transformers makes a model there and moves it."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    angles = positions[..., None].float() * (1.0 / (theta**exponents)).to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rope_textbook_forward(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple]:
    half = x.shape[-1] // 2
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    first, second = x[..., :half].float(), x[..., half:].float()
    out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return out.to(x.dtype), (cos, sin)


def rope_textbook_backward(saved: tuple, d_out: Tensor) -> Tensor:
    cos, sin = saved
    half = d_out.shape[-1] // 2
    first, second = d_out[..., :half].float(), d_out[..., half:].float()
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1).to(d_out.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope_megatron(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Megatron's, with the (empty) part of a head that is not turned: its gradient's zeros are added to the others."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)


def rope_megatron_forward(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple]:
    cos, sin = cos[:, :, None, :].to(x.dtype), sin[:, :, None, :].to(x.dtype)
    return record(lambda x: rope_megatron(x, cos, sin), x)


def rope_megatron_backward(saved: tuple, d_out: Tensor) -> Tensor:
    return pull(saved, d_out)[0]


def rope_hf(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers', heads first: gradients are laid out so that sums over them run in another order."""
    x, half = x.transpose(1, 2), x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + rotated * sin


def rope_hf_forward(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple]:
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    out, saved = record(lambda x: rope_hf(x, cos, sin), x)
    return out.transpose(1, 2), saved


def rope_hf_backward(saved: tuple, d_out: Tensor) -> Tensor:
    return pull(saved, d_out.transpose(1, 2))[0]


TABLES = {
    "textbook": Variant(rope_tables_textbook_forward, None, "angles in float64"),
    "fp32": Variant(rope_tables_fp32_forward, None, "angles in fp32, as Megatron"),
    "host": Variant(rope_tables_host_forward, None, "the same from frequencies of the host, as transformers"),
}
VARIANTS = {
    "textbook": Variant(rope_textbook_forward, rope_textbook_backward, "rotated in fp32, rounded once"),
    "megatron": Variant(rope_megatron_forward, rope_megatron_backward, "x·cos + rotate_half(x)·sin in x's dtype"),
    "hf": Variant(rope_hf_forward, rope_hf_backward, "the same with heads before positions, as transformers"),
}
