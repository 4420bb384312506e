"""Weights & Biases beside the journal, for targets that ask for it with ``train.wandb = "project"``.

The package is imported only then. Its own settings hold, for example ``WANDB_MODE=offline`` or ``wandb login``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forgetrain.durable import read_object, write_json
from forgetrain.errors import UserError
from forgetrain.spec.target import Target

_ID = "wandb.json"


def require_wandb() -> Any:
    """The package. Raises UserError with the command that installs it."""
    try:
        import wandb  # type: ignore[import-not-found]  # optional
    except ImportError:
        raise UserError(
            "wandb is not installed", key="train.wandb", remedy="run pip install 'forgetrain[wandb]', or leave it out"
        ) from None
    return wandb


class Tracker:
    """One run there for one run here: a resumed run goes on under its id, which lies in ``folder/wandb.json``."""

    def __init__(self, target: Target, folder: Path):
        wandb, record = require_wandb(), folder / _ID
        folder.mkdir(parents=True, exist_ok=True)
        known = read_object(record, "remove it to begin a new run there", id=str)["id"] if record.is_file() else None
        self._run = wandb.init(
            project=target.train.wandb, name=target.name, id=known, resume="allow", dir=folder, config=target.plain()
        )
        write_json(record, {"id": self._run.id})
        # Steps that are taken again after a resume or a rollback: the step is a value of ours, not wandb's counter.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()
