"""The engine contract: what references, forged engines, an agent's engine and the trainer all speak.

Typing is structural because a flat engine file imports nothing but torch (and triton on a GPU). A module is an engine
when it has ``build(target, *, device, precision, mesh)``; ``target`` is ``Target.plain()``, nested plain values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One step's data on this rank: N sequences of S tokens; an engine splits it into micro-batches of rows itself.

    tokens: int64 [N, S]; labels: int64 [N, S], already shifted; mask: float32 [N, S], 1 where the loss counts;
    cu_seqlens: int32 [N*S + 1]: ascending boundaries of documents over the flattened N*S tokens, cut at every row,
    beginning with 0 and padded to that fixed length by repeating N*S. loss_denominator: the global sum of the mask
    over micro-batches and ranks, float32 [] ; the caller computes it, so that an engine needs no reduction for it.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    cu_seqlens: Tensor
    loss_denominator: Tensor


class StepResult(NamedTuple):
    """0-dim device tensors, so a step needs no host synchronisation. loss: float32, this rank's share summed over
    ranks; grad_norm: float32, before clipping; applied: bool, false when the norm was not finite and nothing moved."""

    loss: Tensor
    grad_norm: Tensor
    applied: Tensor


class Shard(NamedTuple):
    """A piece of a state tensor as DCP wants it; an unsharded tensor has its own shape and zero offsets."""

    tensor: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


@runtime_checkable
class Engine(Protocol):
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes fp32 weights under canonical names and zeroes the optimizer state. bf16: master = rounded weights."""
        ...

    def step(self, batch: Any, lr: float) -> Any:
        """One optimizer step; takes any object with Batch's fields, returns one with StepResult's."""
        ...

    def loss(self, batch: Any) -> Tensor:
        """Mean loss over the mask, float32 [], of this rank's rows; evaluation only."""
        ...

    def state(self) -> dict[str, Any]:
        """``master/<param>``, ``exp_avg/<param>``, ``exp_avg_sq/<param>`` fp32 and ``step`` int64 [], as Shards.

        ``exp_avg`` is the moving average of gradients that AdamW or Muon keeps; what Muon steps has no ``exp_avg_sq``
        (``spec.moments``).
        """
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def probe(self, batch: Any) -> Iterable[tuple[str, Tensor]]:
        """Forward and gradient taps in the order of ``spec.taps.tap_names``; leaves weights and moments as they were.
        A production engine may leave it out."""
        ...


def make_batch(tokens: Tensor, labels: Tensor, mask: Tensor | None = None, boundaries: Tensor | None = None) -> Batch:
    """A Batch from tokens and labels; ``boundaries`` are flattened positions at which documents begin, besides rows.

    The denominator is this batch's own mask sum; with several ranks the caller replaces it by the global sum.
    """
    n, s = tokens.shape
    mask = torch.ones(n, s, dtype=torch.float32, device=tokens.device) if mask is None else mask
    starts = torch.arange(0, n * s, s, dtype=torch.int32)
    if boundaries is not None:
        starts = torch.unique(torch.cat([starts, boundaries.to(torch.int32).cpu()]))
    cu_seqlens = torch.full((n * s + 1,), n * s, dtype=torch.int32)
    cu_seqlens[: starts.numel()] = starts
    return Batch(tokens, labels, mask, cu_seqlens.to(tokens.device), mask.sum())


def weight_hash(state: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical fp32 masters, names and little-endian bytes, in sorted order of the names."""
    digest = hashlib.sha256()
    for key in sorted(k for k in state if k.startswith("master/")):
        shard = state[key]
        tensor = getattr(shard, "tensor", shard).detach().to("cpu", torch.float32).contiguous()
        digest.update(key.encode())
        digest.update(tensor.numpy().astype("<f4", copy=False).reshape(-1).data)
    return digest.hexdigest()
