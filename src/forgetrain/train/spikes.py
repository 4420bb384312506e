"""Loss spikes: found by their distance from the last losses, and undone when they do not pass.

    spikes = Spikes(z=6.0, window=64, repeats=3, kept=None)
    if spikes.sees(step, loss, stage=0):    # the third in a row: go back to a checkpoint that was good
        spikes.rolled_back(step, back_to)   # the batches in between are left out: the cursor moves on
    spikes.kept()                           # into the manifest of every checkpoint

One spike is a bad batch and passes; the step has moved the weights before its loss is known, and nothing more is done
than counting it. Spikes in a row are bad weights. Then the run goes back to the newest checkpoint whose next step was
no spike, and takes other batches from there, as PaLM's authors did (Chowdhery et al. 2022, section 5.1). All decisions
are a function of the losses, and what they need is in the checkpoint, so a resumed run takes the same ones.

Losses of another mixture or length are another text's: a stage that brings them is not compared with the one before.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from forgetrain.engine.contract import Batch

#: The least standard deviation of losses that is believed, as a share of their mean: losses that hardly differ, as late
#: in a run with a great batch, must not turn every small change into a spike.
LEAST_DEVIATION = 0.01
#: A tap whose root mean square is so many times that with good weights is named as the first bad one.
GROWN = 4.0


class Spikes:
    """Finds losses more than ``z`` standard deviations above the mean of the last ``window`` of the stage that were no
    spikes.

    Nothing is judged before the window is full. z = 0 finds none. first: the step of the first spike of those in a row
    that are seen now, or None. total: spikes seen. offset: by how many batches the data is ahead of the steps.
    """

    def __init__(self, *, z: float, window: int, repeats: int, kept: Mapping[str, Any] | None = None):
        """kept: what ``kept`` answered when the checkpoint was written that the run goes on from."""
        self.z, self.repeats = z, repeats
        self._losses: deque[float] = deque(maxlen=window)
        self._stage: int | None = None  # of the losses in the window
        self.first: int | None = None
        self.in_a_row = self.total = self.offset = 0
        self.rollbacks: list[dict[str, Any]] = []
        if kept is not None:
            self._take(kept)
            self.total, self.offset = kept["total"], kept["offset"]
            self.rollbacks = [dict(rollback) for rollback in kept["rollbacks"]]

    def _take(self, kept: Mapping[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(kept["losses"])
        self._stage = kept.get("stage")  # checkpoints of earlier versions have none
        self.first, self.in_a_row = kept["first"], kept["in_a_row"]

    def kept(self) -> dict[str, Any]:
        """Plain values that JSON keeps to the last bit."""
        return {
            "losses": list(self._losses),
            "stage": self._stage,
            "first": self.first,
            "in_a_row": self.in_a_row,
            "total": self.total,
            "offset": self.offset,
            "rollbacks": list(self.rollbacks),
        }

    def score(self, loss: float) -> float:
        """Standard deviations above the mean of the window; 0 while it is not full, infinite for what is no number."""
        if not math.isfinite(loss):
            return math.inf
        if len(self._losses) < (self._losses.maxlen or 0):
            return 0.0
        mean = statistics.fmean(self._losses)
        deviation = max(statistics.pstdev(self._losses), LEAST_DEVIATION * abs(mean))
        return (loss - mean) / deviation if deviation else 0.0

    def sees(self, step: int, loss: float, stage: int = 0) -> bool:
        """Takes the loss of an applied step; true when it is the ``repeats``-th spike in a row. The loss of another
        ``stage`` begins a new window."""
        if not self.z:
            return False
        if self._stage not in (None, stage):
            self._losses.clear()
            self.first, self.in_a_row = None, 0
        self._stage = stage
        if self.score(loss) <= self.z:
            self._losses.append(loss)
            self.first, self.in_a_row = None, 0
            return False
        self.first = step if self.first is None else self.first
        self.in_a_row += 1
        self.total += 1
        return self.in_a_row >= self.repeats

    def newest_good(self, step: int) -> int:
        """The last step whose checkpoint is good for sure after ``step`` steps: the step after it was no spike."""
        return (step + 1 if self.first is None else self.first) - 2

    def rolled_back(self, step: int, back_to: int, loss: float, kept: Mapping[str, Any] | None) -> None:
        """The run goes on from ``back_to``, whose checkpoint held ``kept`` (None at the beginning), and leaves out the
        batches that it took since, up to that of ``step``."""
        self.rollbacks.append(
            {
                "step": step,
                "back_to": back_to,
                "loss": loss,
                "score": round(self.score(loss), 2) if math.isfinite(loss) else None,
                "batches_left_out": [back_to + self.offset, step + self.offset],
            }
        )
        self.offset += step - back_to
        self._take(kept or {"losses": [], "first": None, "in_a_row": 0})

    def times_back_to(self, step: int) -> int:
        return sum(rollback["back_to"] == step for rollback in self.rollbacks)


def sizes_of_taps(engine: Any, batch: Batch) -> dict[str, float]:
    """Tap → root mean square, in topological order; empty for an engine without a probe. Every rank calls it."""
    if not hasattr(engine, "probe"):
        return {}
    return {name: float(tensor.detach().double().square().mean().sqrt()) for name, tensor in engine.probe(batch)}


def first_grown(bad: Mapping[str, float], good: Mapping[str, float]) -> str | None:
    """The first tap that is no number, or ``GROWN`` times as large as with good weights."""
    return next((name for name, size in bad.items() if not size <= GROWN * max(good.get(name, 0.0), 1e-12)), None)
