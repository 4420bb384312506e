"""Gradient norm, clipping and AdamW (arXiv 1711.05101) over flat buffers; nothing comes to the host.

The norm is sqrt(sum of squares) over the whole flat gradient, by fixed partial sums. If it is not finite,
``applied`` is false and no parameter, moment or counter moves. Else, as torch.optim.AdamW and clip_grad_norm_:

    g = grad * min(1, clip / (norm + 1e-6))
    master *= 1 - lr * decay (matrices only)       m += (g - m) * (1 - beta1)       v = beta2 * v + (1 - beta2) * g²
    master -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)          weight = round(master)

Everything is fp32 but the weight, which has the activations' dtype, and t and the powers, which are taken in fp64.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# Launch options and what a kernel's arguments are inside it: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NORM_PARTS = 1056  # programs that sum squares, at most: eight on each of an H200's multiprocessors


@triton.jit
def square_sum_kernel(grad_ptr, part_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float32)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, stride):
        at = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < count, other=0.0)
        total += grad * grad
    tl.store(part_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def adamw_kernel(
    grad_ptr, master_ptr, m_ptr, v_ptr, weight_ptr, scalars_ptr, count, decayed, beta1, beta2, eps, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    clip = tl.load(scalars_ptr)
    shrink = tl.load(scalars_ptr + 1)
    rate = tl.load(scalars_ptr + 2)
    root = tl.load(scalars_ptr + 3)
    applied = tl.load(scalars_ptr + 4)
    if applied != 0.0:
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * clip
        m = tl.load(m_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        master = tl.load(master_ptr + at, mask=inside, other=0.0)
        m += (grad - m) * (1.0 - beta1)
        v = v * beta2 + grad * grad * (1.0 - beta2)
        master *= tl.where(at < decayed, shrink, 1.0)
        master -= rate * (m / (tl.sqrt(v) / root + eps))
        tl.store(m_ptr + at, m, mask=inside)
        tl.store(v_ptr + at, v, mask=inside)
        tl.store(master_ptr + at, master, mask=inside)
        tl.store(weight_ptr + at, master, mask=inside)


def grad_norm(grad: Tensor) -> Tensor:
    """sqrt of the sum of squares of a flat fp32 buffer, fp32 []."""
    programs = min(NORM_PARTS, -(-grad.numel() // 2048))
    parts = torch.empty(programs, dtype=torch.float32, device=grad.device)
    square_sum_kernel[(programs,)](grad, parts, grad.numel(), BLOCK=2048, num_warps=8)
    return parts.double().sum().sqrt().float()


def adamw_(
    flat: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    decayed: int,
    step: Tensor,
    lr: Tensor,
    norm: Tensor,
    clip: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Tensor:
    """One update of flat = (grad, master, m, v, weight), whose first ``decayed`` elements are matrices.

    step int64 [] and lr fp64 [] live on the device; step is advanced. Returns applied, bool [].
    """
    grad, master, m, v, weight = flat
    applied = torch.isfinite(norm)
    step += applied
    t = step.double()
    scalars = torch.stack(
        [
            (clip / (norm.double() + 1e-6)).clamp(max=1.0),
            1.0 - lr * weight_decay,
            lr / (1.0 - betas[0] ** t),
            (1.0 - betas[1] ** t).sqrt(),
            applied.double(),
        ]
    ).float()
    count = grad.numel()
    adamw_kernel[(triton.cdiv(count, 1024),)](
        grad, master, m, v, weight, scalars, count, decayed, betas[0], betas[1], eps, BLOCK=1024, num_warps=4
    )
    return applied
