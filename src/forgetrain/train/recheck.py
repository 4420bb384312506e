"""Silent corruption: now and then a step is taken twice from the same state, and must give the same bits.

    recheck = Recheck(every=1000, deterministic=True, world=world, evidence=run / "train")
    result = recheck.step(engine, batch, lr, number)      # as engine.step, twice when ``number`` is due

Compared are the loss, the gradient norm, and of each tensor of the new state the sum of its bits, in which one flipped
bit always shows. The state before is copied to host memory meanwhile. A machine that computes wrongly without an error
is seldom, but a run that trusts it is lost: Meta's report on Llama 3 (arXiv 2407.21783, table 5) counts six such
interruptions among 419 in 54 days.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetrain.engine.contract import Batch, Engine, Shard
from forgetrain.errors import UserError
from forgetrain.train.health import save_evidence
from forgetrain.train.saving import Staged
from forgetrain.train.world import World

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Recheck:
    def __init__(self, *, every: int, deterministic: bool, world: World, evidence: Path):
        """every: steps between two checks, 0 for none. An engine that is not deterministic cannot be checked so."""
        self.every = every if deterministic else 0
        self.off_because_of_engine = bool(every) and not deterministic
        self.world, self.evidence = world, evidence

    def step(self, engine: Engine, batch: Batch, lr: float, number: int) -> Any:
        """The engine's step, the ``number``-th of the run; the same on all ranks.

        Raises:
            UserError: taken again from the same state it gave other bits, on this rank or another.
        """
        if not self.every or number % self.every:
            return engine.step(batch, lr)
        before = Staged().copy(engine.state())  # buffers of its own: an engine may keep what it restores
        first = engine.step(batch, lr)
        seen = _bits(first, engine.state())
        engine.restore(before)
        second = engine.step(batch, lr)
        again = _bits(second, engine.state())
        differs = [name for name in seen if seen[name] != again[name]]
        by_rank = self.world.gather(differs)
        if any(by_rank):
            self._end(number, batch, by_rank, first, second)
        return second

    def _end(self, number: int, batch: Batch, by_rank: list[list[str]], first: Any, second: Any) -> None:
        folder = self.evidence / f"evidence-{number:08d}"
        values = [{key: float(getattr(r, key)) for key in ("loss", "grad_norm", "applied")} for r in (first, second)]
        report = {"step": number, "first": values[0], "again": values[1], "differs_by_rank": by_rank}
        self.world.first(lambda: save_evidence(folder, batch, report))
        rank, names = next((rank, names) for rank, names in enumerate(by_rank) if names)
        raise UserError(
            f"step {number} taken twice from the same state gave other bits: {len(names)} values differ on rank {rank}"
            f", the first {names[0]}",
            file=folder,
            remedy="the machine computes wrongly or the engine is not deterministic; see docs/train.md, then --resume",
        )


def _bits(result: Any, state: Mapping[str, Shard]) -> dict[str, int]:
    """Name → the sum of the bits, as integers; equal for equal tensors."""
    tensors = {"loss": result.loss, "grad_norm": result.grad_norm, "applied": result.applied}
    tensors |= {name: shard.tensor for name, shard in state.items()}
    sums = torch.stack([_sum_of_bits(tensor).cpu() for tensor in tensors.values()])
    return dict(zip(tensors, sums.tolist(), strict=True))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(_INTEGER[flat.element_size()]).sum(dtype=torch.int64)
