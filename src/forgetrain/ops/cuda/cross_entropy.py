"""Cross-entropy and its gradient in place on the logits: two passes over a row, the second mostly from L2.

    loss[t] = mask[t] / denominator * (logsumexp(logits[t]) - logits[t, label[t]])
    d_logits[t] = mask[t] / denominator * (softmax(logits[t]) - onehot(label[t]))

logits [T, V] in the activations' dtype, labels int64 [T], mask fp32 [T], denominator fp32 [], loss fp32 [T];
arithmetic and sums are fp32, in base 2. The gradient overwrites the logits.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportAssignmentType=false
# Launch options and what a kernel's arguments are inside it: Triton's own types know neither.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# As many programs as an H200 holds at once: more rows in work would push each other out of L2 between the passes.
PROGRAMS, LANES, WARPS = 264, 1024, 32


@triton.jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, mask_ptr, denominator_ptr, loss_ptr, rows,
    V: tl.constexpr, LANES: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    LOG2_E = 1.4426950408889634
    col = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        row_ptr = logits_ptr + tl.cast(row, tl.int64) * V
        label = tl.load(labels_ptr + row)
        weight = tl.load(mask_ptr + row) / tl.load(denominator_ptr)
        # Read before the reductions below, whose barriers keep every thread from overwriting it too early.
        chosen = tl.load(row_ptr + label).to(tl.float32)
        # Each lane keeps its own maximum and sum over groups of eight, so that no turn of the loop waits for another.
        largest = tl.full([LANES], -1e30, dtype=tl.float32)
        total = tl.zeros([LANES], dtype=tl.float32)
        for start in range(0, V, LANES * 8):
            inside = start + col < V
            x = tl.load(row_ptr + start + col, mask=inside, other=-float("inf"), eviction_policy="evict_last")
            x = x.to(tl.float32) * LOG2_E
            higher = tl.maximum(largest, tl.max(x, axis=1))
            total = total * tl.exp2(largest - higher) + tl.sum(tl.exp2(x - higher[:, None]), axis=1)
            largest = higher
        most = tl.max(largest, axis=0)
        log_sum = most + tl.log2(tl.sum(total * tl.exp2(largest - most), axis=0))
        tl.store(loss_ptr + row, weight * (log_sum / LOG2_E - chosen))
        if GRADIENT:
            for start in range(0, V, LANES * 8):
                inside = start + col < V
                x = tl.load(row_ptr + start + col, mask=inside, other=-float("inf"), eviction_policy="evict_first")
                x = x.to(tl.float32) * LOG2_E
                d_x = weight * (tl.exp2(x - log_sum) - tl.where(start + col == label, 1.0, 0.0))
                tl.store(row_ptr + start + col, d_x, mask=inside, eviction_policy="evict_first")


def cross_entropy_(logits: Tensor, labels: Tensor, mask: Tensor, denominator: Tensor, gradient: bool) -> Tensor:
    """Returns the rows' losses [T]; with ``gradient`` the logits become their own gradient."""
    rows, vocab = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    cross_entropy_kernel[(min(PROGRAMS, rows),)](
        logits, labels, mask, denominator, loss, rows,
        V=vocab, LANES=LANES, GRADIENT=gradient, num_warps=WARPS,
    )  # fmt: skip
    return loss
