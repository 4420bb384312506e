"""Embedding: x[t] = weight[token[t]]; the gradient of a row is the sum over the tokens that read it.

forward(tokens_NS int64, weight_VD) -> x_NSD in the weight's dtype; backward -> d_weight_VD in the weight's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from forgetrain.ops.variant import Variant
from forgetrain.ops.vjp import pull, record


def embedding_textbook_forward(tokens: Tensor, weight: Tensor) -> tuple[Tensor, tuple]:
    return weight[tokens], (tokens, weight.shape)


def embedding_textbook_backward(saved: tuple, d_out: Tensor) -> Tensor:
    tokens, shape = saved
    d_weight = torch.zeros(shape, dtype=torch.float32, device=d_out.device)
    d_weight.index_add_(0, tokens.reshape(-1), d_out.reshape(-1, shape[1]).float())
    return d_weight.to(d_out.dtype)


def embedding_torch_forward(tokens: Tensor, weight: Tensor) -> tuple[Tensor, tuple]:
    return record(lambda w: F.embedding(tokens, w), weight)


def embedding_torch_backward(saved: tuple, d_out: Tensor) -> Tensor:
    return pull(saved, d_out)[0]


def embedding_indexing_forward(tokens: Tensor, weight: Tensor) -> tuple[Tensor, tuple]:
    return record(lambda w: w[tokens], weight)


def embedding_indexing_backward(saved: tuple, d_out: Tensor) -> Tensor:
    return pull(saved, d_out)[0]


VARIANTS = {
    "textbook": Variant(embedding_textbook_forward, embedding_textbook_backward, "rows summed in fp32, rounded once"),
    "torch": Variant(embedding_torch_forward, embedding_torch_backward, "F.embedding, as transformers and Megatron"),
    "indexing": Variant(
        embedding_indexing_forward, embedding_indexing_backward, "weight[tokens], Megatron's deterministic mode"
    ),
}
