"""Steps that went wrong: counted, and past a limit the run ends with the evidence saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from forgetrain.durable import no_space_named, write_json
from forgetrain.engine.contract import Batch
from forgetrain.errors import UserError
from forgetrain.train.metrics import Measured


class Health:
    """Counts steps whose gradient norm was not finite. The engine left the weights alone then; the run goes on until
    ``limit`` of them come in a row."""

    def __init__(self, limit: int, skipped: int = 0):
        self.limit, self.skipped, self.in_a_row = limit, skipped, 0

    def sees(self, measured: Measured, engine: str) -> bool:
        """Counts a step; true when the limit is reached.

        Raises:
            UserError: the engine says that it applied an update from a norm that is not finite.
        """
        if measured.applied and not math.isfinite(measured.grad_norm):
            raise UserError(
                f"applied an update with a gradient norm of {measured.grad_norm} at step {measured.step}",
                file=engine,
                remedy="an engine must leave the weights alone then; see docs/engine-contract.md",
            )
        if measured.applied:
            self.in_a_row = 0
            return False
        self.skipped += 1
        self.in_a_row += 1
        return self.in_a_row >= self.limit


def check_result(result: Any, engine: str) -> None:
    """Refuses what is no StepResult, by name. Looks at shapes only, so it does not wait for the device."""
    for field in ("loss", "grad_norm", "applied"):
        value = getattr(result, field, None)
        if not isinstance(value, torch.Tensor) or value.dim() != 0:
            found = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(
                f"step() returns a wrong {field}",
                file=engine,
                value=found,
                remedy="it must be a 0-dim tensor; see docs/engine-contract.md",
            )


def first_bad_tap(engine: Any, batch: Batch) -> str | None:
    """The first tap in topological order that holds NaN or Inf; None when there is none or the engine has no probe.
    Every rank calls it, for probing may reduce over ranks."""
    bad = None
    if hasattr(engine, "probe"):
        for name, tensor in engine.probe(batch):
            if bad is None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad = name
    return bad


def save_evidence(folder: Path, batch: Batch, report: dict[str, Any]) -> None:
    """The batch of a bad step as safetensors, and a report about it; numbers that JSON does not know as text."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in batch._asdict().items()}
    with no_space_named(folder):
        save_file(tensors, folder / "batch.safetensors")
    write_json(folder / "report.json", report)
