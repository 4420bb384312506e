"""TensorBoard's event files: the values of a step in one event.

    events = Events(run / "train" / "tensorboard", step=0)
    events.write(1, {"loss": 3.2, "lr": 1e-3})

What TensorBoard shows is what ``SummaryWriter.add_scalar`` gives; but that makes an event of each value, and their
checksums, which are plain Python, are taken while the interpreter has the next step to launch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]  # made at import
from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]
from torch.utils.tensorboard.writer import FileWriter

from forgetrain.durable import NO_SPACE, no_space_named


class Events:
    """A new event file under ``folder``; what earlier ones have beyond ``step`` is shown no more.

    Raises, from any call, the error that the writing thread met; a UserError where the disk is full.
    """

    def __init__(self, folder: Path, step: int):
        self._folder, self._hook = folder, threading.excepthook
        threading.excepthook = self._said_by_write
        self._writer = FileWriter(str(folder))
        if step:
            purge = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(step=step + 1, session_log=purge), step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers among ``values``; flags and words are left out."""
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        scalars = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        with no_space_named(self._folder):
            self._writer.add_summary(Summary(value=scalars), step)

    def close(self) -> None:
        try:
            with no_space_named(self._folder):
                self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _said_by_write(self, failure: Any) -> None:
        """The writing thread keeps its error for ``write`` and raises it besides; of a full disk one line is enough."""
        if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in NO_SPACE):
            self._hook(failure)
