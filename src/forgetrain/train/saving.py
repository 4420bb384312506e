"""Saving beside the steps: a step pays for the copy of the state alone.

    with Saver(root, world, target.train) as saver:
        saver.reserve(engine)                          # the copy's memory, before the first step
        saver.start(engine, step, facts, tokenizer)    # copies the state to host memory, returns, writes behind
        saver.failed                                   # asked at every step; when true on any rank, all call wait()
        saver.wait()                                   # until the checkpoint has its name; raises what went wrong

Writing, syncing, hashing, renaming and pruning run in a thread of every rank, with a process group of their own, so
that their exchanges never meet those of the steps. One save is under way at a time: the next waits for the one before.
The copy lies in buffers that are made once and kept; they take as much host memory as the state.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from forgetrain.engine.contract import Engine, Shard
from forgetrain.spec.target import Training
from forgetrain.train import checkpoint
from forgetrain.train.world import World

#: When the run ends by an error, so long may a save that is under way still take.
GRACE_SECONDS = 30.0


class Staged:
    """Host buffers for one copy of an engine's state."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, shards: Mapping[str, Shard]) -> None:
        """Takes the memory for copies of this state, every page of it, so that no copy has to wait for the system."""
        for name, shard in shards.items():
            self._buffer(name, shard.tensor).zero_()

    def copy(self, shards: Mapping[str, Shard]) -> dict[str, Shard]:
        """The state in host memory. Valid until the next call, which reuses the memory."""
        on_gpu = any(shard.tensor.is_cuda for shard in shards.values())
        if on_gpu:
            torch.cuda.synchronize()  # an engine may update on streams of its own
        copied = {name: Shard(self._copy(name, s.tensor), *s[1:]) for name, s in shards.items()}
        if on_gpu:
            torch.cuda.synchronize()
        return copied

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        return self._buffer(name, tensor).copy_(tensor.detach(), non_blocking=True)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer


class Saver:
    """Writes checkpoints under ``root`` in the background and prunes old ones; every rank makes the same calls."""

    def __init__(self, root: Path, world: World, settings: Training):
        self.root, self.settings = root, settings
        self._world = world.beside()
        self._staged = Staged()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # what is nearly durable should not be lost to an error elsewhere
            self._thread.join(GRACE_SECONDS)

    def reserve(self, engine: Engine) -> None:
        """Before the first step: takes the copy's memory, which else the first save's step would wait for."""
        self._staged.reserve(engine.state())

    @property
    def failed(self) -> bool:
        """Whether the save under way has gone wrong on this rank."""
        return self._error is not None

    def start(
        self, engine: Engine, step: int, facts: Mapping[str, Any], tokenizer: Path, needed: int | None = None
    ) -> None:
        """Copies the state after ``step`` steps and writes it behind; waits first for the save before.

        needed: the newest regular checkpoint up to this step is kept besides.

        Raises:
            UserError: the save before went wrong, for example on a full disk.
        """
        self.wait()
        copied = self._staged.copy(engine.state())
        # A daemon, so that a second Ctrl-C can end the process; a checkpoint that is not whole has no name.
        self._thread = threading.Thread(
            target=self._write,
            args=(copied, step, dict(facts), tokenizer, needed),
            name="forgetrain-saver",
            daemon=True,
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is under way. Raises what the last one raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(
        self, copied: dict[str, Shard], step: int, facts: dict[str, Any], tokenizer: Path, needed: int | None
    ) -> None:
        try:
            checkpoint.save(copied, self.root, step, facts, tokenizer, self._world)
            self._world.first(lambda: self._prune(needed))
        except BaseException as error:  # carried to the thread that takes the steps
            self._error = error

    def _prune(self, needed: int | None) -> None:
        settings, kept = self.settings, []
        if needed is not None:
            kept = checkpoint.regular(self.root, needed)[:1]
        checkpoint.prune(self.root, settings.keep_last, settings.keep_every, *kept)
