"""SwiGLU (arXiv 2002.05202): out = silu(gate) · up, silu(x) = x · sigmoid(x).

forward(gate_TF, up_TF) -> out_TF in their dtype; backward -> (d_gate, d_up).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from forgetrain.ops.variant import Variant
from forgetrain.ops.vjp import pull, record


def swiglu_textbook_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, tuple]:
    wide = gate.float()
    return (wide * torch.sigmoid(wide) * up.float()).to(gate.dtype), (gate, up)


def swiglu_textbook_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = saved
    wide, d_wide = gate.float(), d_out.float()
    sigmoid = torch.sigmoid(wide)
    d_gate = d_wide * up.float() * sigmoid * (1.0 + wide * (1.0 - sigmoid))
    return d_gate.to(gate.dtype), (d_wide * wide * sigmoid).to(up.dtype)


def swiglu_torch_forward(gate: Tensor, up: Tensor) -> tuple[Tensor, tuple]:
    return record(lambda gate, up: F.silu(gate) * up, gate, up)


def swiglu_torch_backward(saved: tuple, d_out: Tensor) -> tuple[Tensor, ...]:
    return pull(saved, d_out)


VARIANTS = {
    "textbook": Variant(swiglu_textbook_forward, swiglu_textbook_backward, "one expression in fp32, rounded once"),
    "torch": Variant(
        swiglu_torch_forward, swiglu_torch_backward, "F.silu(gate) · up, rounded between, as both references"
    ),
}
