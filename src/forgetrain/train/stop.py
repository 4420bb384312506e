"""Why a run stops before its last step: a signal, or its deadline; agreed by all ranks.

with Stop(world, deadline_seconds=84600.0) as stop:
    reason = stop.agreed()          # once a step, on every rank; "" goes on
raise SystemExit(exit_code(reason))
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from forgetrain.train.world import World

#: What ``agreed`` answers when the time is up: the key that says how much there was.
DEADLINE = "train.deadline"
#: What ``agreed`` answers when a save in the background failed on some rank.
SAVE_FAILED = "save failed"

#: SIGUSR1 and SIGUSR2 are what Slurm's ``--signal`` is usually asked for.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
#: In the exchange the greatest number wins; signals are below 65.
_DEADLINE, _SAVE_FAILED = 1000, 1001
_NAMES = {0: "", _DEADLINE: DEADLINE, _SAVE_FAILED: SAVE_FAILED}


def exit_code(reason: str) -> int:
    """The command's exit code: 128 + the signal's number, or 124 for the deadline, as timeout(1) has it."""
    return 124 if reason == DEADLINE else 128 + signal.Signals[reason]


class Stop:
    """Signals and the deadline ask the run to stop after its step, with a checkpoint; a second SIGINT stops at once.

    With several ranks a signal may reach them in different steps. ``agreed`` is called once a step by every rank; it
    answers what was asked one step before, so that the exchange runs beside the step and all stop together.
    """

    def __init__(self, world: World, deadline_seconds: float | None = None):
        """deadline_seconds: from now on; None sets none."""
        self.world, self.signal = world, 0
        self._until = None if deadline_seconds is None else time.monotonic() + deadline_seconds
        self._pending: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> Stop:
        main = threading.current_thread() is threading.main_thread()  # Python takes signals nowhere else
        self._before = {number: signal.signal(number, self._asked) for number in SIGNALS if main}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._pending is not None and kind is None:  # after an error the others may never answer
            self._pending[1].wait()

    def _asked(self, number: int, _: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, *, save_failed: bool = False) -> str:
        """Why any rank wants to stop: a signal's name, ``DEADLINE``, ``SAVE_FAILED``, or "" to go on."""
        wanted = _SAVE_FAILED if save_failed else self._own()
        if self.world.control is not None:
            wanted = self._exchanged(wanted)
        return _NAMES[wanted] if wanted in _NAMES else signal.Signals(wanted).name

    def _own(self) -> int:
        if self._until is not None and time.monotonic() >= self._until:
            return _DEADLINE
        return self.signal

    def _exchanged(self, wanted: int) -> int:
        answer = 0
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            answer = int(flag.item())
        flag = torch.tensor(wanted)
        self._pending = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.world.control, async_op=True))
        return answer
