"""Cross-entropy per token: nll = logsumexp(logits) - logits[label]; d_logits = (softmax - onehot(label)) · d_nll.

forward(logits_TV, labels_T) -> nll_T in fp32, computed in fp32; backward(saved, d_nll_T) -> d_logits in logits' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from forgetrain.ops.variant import Variant
from forgetrain.ops.vjp import pull, record


def cross_entropy_textbook_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, tuple]:
    wide = logits.float()
    log_sum = torch.logsumexp(wide, dim=-1)
    return log_sum - wide.gather(1, labels[:, None])[:, 0], (logits, labels, log_sum)


def cross_entropy_textbook_backward(saved: tuple, d_nll: Tensor) -> Tensor:
    logits, labels, log_sum = saved
    d_logits = torch.exp(logits.float() - log_sum[:, None])
    d_logits.scatter_add_(1, labels[:, None], torch.full_like(d_logits[:, :1], -1.0))
    return (d_logits * d_nll[:, None]).to(logits.dtype)


def cross_entropy_torch_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, tuple]:
    return record(lambda logits: F.cross_entropy(logits.float(), labels, reduction="none"), logits)


def cross_entropy_torch_backward(saved: tuple, d_nll: Tensor) -> Tensor:
    return pull(saved, d_nll)[0]


def cross_entropy_megatron_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, tuple]:
    """Megatron's vocabulary-parallel form on one rank: log(sum(exp(logits - max))) - (logits[label] - max)."""
    wide = logits.float()
    wide = wide - wide.max(dim=-1)[0][:, None]
    predicted = wide[torch.arange(labels.shape[0], device=labels.device), labels]
    exponentials = torch.exp(wide)
    total = exponentials.sum(dim=-1)
    return torch.log(total) - predicted, (exponentials.div_(total[:, None]), labels, logits.dtype)


def cross_entropy_megatron_backward(saved: tuple, d_nll: Tensor) -> Tensor:
    softmax, labels, dtype = saved
    softmax[torch.arange(labels.shape[0], device=labels.device), labels] -= 1.0
    return softmax.mul_(d_nll[:, None]).to(dtype)


VARIANTS = {
    "textbook": Variant(
        cross_entropy_textbook_forward, cross_entropy_textbook_backward, "logsumexp minus the label's logit"
    ),
    "torch": Variant(cross_entropy_torch_forward, cross_entropy_torch_backward, "F.cross_entropy on fp32 logits"),
    "megatron": Variant(
        cross_entropy_megatron_forward, cross_entropy_megatron_backward, "Megatron's vocabulary-parallel form"
    ),
}
