"""How threads wait for each other, what becomes of freed memory, and what need not be asked of the compiler. Imports
nothing that imports torch, for the first must be decided before that.

By default an OpenMP thread that waits keeps its core busy for milliseconds. Several processes then take each other's
cores for waiting, and a step takes many times as long. Threads that sleep at once lose a quarter to two fifths of their
speed on a quiet machine. So they wait busily for some microseconds, then sleep (docs/decisions/004-waiting-threads.md
has the figures).

glibc gives large blocks back to the kernel when they are freed, and takes fresh pages, which the kernel zeroes, for the
next ones: a step of nano-cpu then costs 20,000 page faults (docs/decisions/010-kept-memory.md). So it keeps them.

Before it compiles, torch's compiler builds its vector headers for each of the processor's instruction sets and loads
what came out, to see whether the C++ compiler can: every one that builds torch's other headers does. That takes a
second of every process, and several where nothing of it is kept; so it is told.

Bits depend on none of this.
"""

from __future__ import annotations

import ctypes
import os

_LARGEST = 2**31 - 1  # bytes; what mallopt's int can say
#: torch's Linux builds use GNU's OpenMP and glibc's malloc.
_RUNTIME = {
    "GOMP_SPINCOUNT": "20000",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(_LARGEST),
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # a user who sets one has decided how threads wait
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def runtime() -> dict[str, str]:
    """For the environment of a process that will import torch: threads wait as this one's user decided."""
    waiting = {name: os.environ[name] for name in _WAITING if name in os.environ}
    return {name: value for name, value in _RUNTIME.items() if not waiting or name not in _WAITING} | waiting


def prepare_process() -> None:
    """The same for this process, unless its user decided otherwise. Waiting is without effect once torch was
    imported."""
    for name, value in runtime().items():
        if not name.startswith("MALLOC_"):  # which is read before a process begins
            os.environ.setdefault(name, value)
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, int(_RUNTIME["MALLOC_MMAP_THRESHOLD_"]))
        mallopt(_M_TRIM_THRESHOLD, int(_RUNTIME["MALLOC_TRIM_THRESHOLD_"]))
