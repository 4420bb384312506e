"""What a run measures: step results on their way from the device, JSON lines, TensorBoard, speed.

lagged = Lagged("cuda:0", every=10)
lagged.push(step, lr, engine.step(batch, lr))
for measured in lagged.ready(): ...            # never waits for the step just launched
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from forgetrain.durable import no_space_named, write_text


class Measured(NamedTuple):
    """One step: the number of steps taken with it, and what the engine answered."""

    step: int
    lr: float
    loss: float
    grad_norm: float
    applied: bool


class Lagged:
    """Holds steps' 0-dim results until the host may read them without waiting.

    On a CPU that is at once. On a GPU each step's three numbers are copied to pinned host memory behind the step, and
    read ``every`` steps, those of the newest step left for the next time.
    """

    def __init__(self, device: str, every: int):
        self.on_gpu, self.every = device.startswith("cuda"), every
        self._waiting: deque[tuple[int, float, Tensor, Any]] = deque()

    def push(self, step: int, lr: float, result: Any) -> None:
        packed = torch.stack([result.loss.float(), result.grad_norm.float(), result.applied.float()])
        event = None
        if self.on_gpu:
            host = torch.empty(3, pin_memory=True)
            host.copy_(packed, non_blocking=True)
            packed, event = host, torch.cuda.Event()
            event.record()
        self._waiting.append((step, lr, packed, event))

    def ready(self, *, all: bool = False) -> Iterator[Measured]:
        """The steps that can be read; ``all`` waits for every one."""
        if self.on_gpu and not all and len(self._waiting) <= self.every:
            return
        while len(self._waiting) > (1 if self.on_gpu and not all else 0):
            step, lr, packed, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, applied = packed.tolist()
            yield Measured(step, lr, loss, norm, bool(applied))


class Clock:
    """Seconds spent in steps: evaluations and checkpoints are taken out."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._out = 0.0

    def seconds(self) -> float:
        return time.monotonic() - self._began - self._out

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._out += time.monotonic() - began


class Mirror(Protocol):
    """What else takes the journal's values."""

    def write(self, step: int, values: dict[str, Any]) -> None: ...


class Journal:
    """``metrics.jsonl`` and TensorBoard's events under ``folder``, continued after ``step``; and a mirror of them.

    Lines beyond ``step``, which an interrupted run had written after its last checkpoint, are dropped: the steps are
    taken again. JSON has no NaN; such values are null there. A line is with the system when ``write`` returns, so that
    a kill loses none; TensorBoard's own thread writes its events behind.
    """

    def __init__(self, folder: Path, step: int, mirror: Mirror | None = None):
        from forgetrain.train.events import Events  # a second to import, and only rank 0 needs it

        folder.mkdir(parents=True, exist_ok=True)
        self._mirror = mirror
        self.path = folder / "metrics.jsonl"
        kept = "".join(json.dumps(line) + "\n" for line in read_journal(self.path) if line["step"] <= step)
        if self.path.is_file() and self.path.read_text(encoding="utf-8") != kept:
            write_text(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._events = Events(folder / "tensorboard", step)

    def write(self, step: int, **values: Any) -> None:
        finite = {key: None if value != value or value in _INFINITE else value for key, value in values.items()}
        with no_space_named(self.path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._events.write(step, values)
        if self._mirror is not None:
            self._mirror.write(step, values)

    def close(self) -> None:
        try:
            with no_space_named(self.path):
                self._file.close()
        finally:
            self._events.close()


_INFINITE = (float("inf"), float("-inf"))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def measured_gemm_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of this CPU's square matrix product at the present thread count: the best of those in ``seconds``. Of bf16
    it is fp32's, where torch has nothing faster: a processor without instructions for bf16 multiplies it widened."""
    rate = _gemm_rate(torch.float32, size, seconds)
    if dtype == torch.float32 or _gemm_rate(dtype, size // 8, 0.0) < rate / 16:
        return rate  # a large product would take seconds there
    return max(rate, _gemm_rate(dtype, size, seconds))


def _gemm_rate(dtype: torch.dtype, size: int, seconds: float) -> float:
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    torch.mm(a, b)
    return 2 * size**3 / least_time(lambda: torch.mm(a, b), seconds)


def least_time(run: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest of the runs that begin within ``seconds``, of which there is one at least."""
    best, until = float("inf"), time.monotonic() + seconds
    while best == float("inf") or time.monotonic() < until:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best
