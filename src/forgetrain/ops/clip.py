"""Clipping by the global norm: with n = ‖all gradients‖₂, gradients are scaled by min(1, clip / n) in place.

forward(grads: list of fp32 tensors, clip) -> the norm before clipping, fp32 []; a norm that is not finite leaves the
gradients to the caller, who skips the update. The order of the list is part of the bits.
"""

# torch.optim and torch.nn.utils are made of the foreach functions, which torch does not list among its own
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import torch
from torch import Tensor

from forgetrain.ops.variant import Variant


def clip_textbook_forward(grads: list[Tensor], clip: float) -> Tensor:
    norm = torch.stack([(grad * grad).sum() for grad in grads]).sum().sqrt()
    factor = torch.clamp(clip / norm, max=1.0)
    for grad in grads:
        grad.mul_(factor)
    return norm


def clip_torch_forward(grads: list[Tensor], clip: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_: the norm of the norms, and clip / (norm + 1e-6). On a GPU its foreach kernel adds
    in another order than that of one tensor."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)), 2.0)
    factor = torch.clamp(clip / (norm + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(factor)
    return norm


def clip_megatron_forward(grads: list[Tensor], clip: float) -> Tensor:
    """Megatron without Apex or Transformer Engine: the norm of the norms on the host, squared in fp32, its root and the
    factor in double."""
    norms = torch.stack([torch.norm(grad) for grad in grads]).cpu()
    norm = (torch.norm(norms) ** 2.0).double() ** 0.5
    factor = clip / (norm + 1.0e-6)
    if factor < 1.0:
        for grad in grads:
            grad.copy_(grad * float(factor))
    return norm.float().to(grads[0].device)


VARIANTS = {
    "textbook": Variant(clip_textbook_forward, None, "one sum of squares"),
    "torch": Variant(clip_torch_forward, None, "torch.nn.utils.clip_grad_norm_"),
    "megatron": Variant(clip_megatron_forward, None, "Megatron's own clipping, scaled only when above the limit"),
}
