"""Host memory of large tensors, used again once nothing refers to the last one in it.

    memory.keep()                      # from now on, in this process
    memory.empty((4608, 1536))         # fp32, uninitialised

What a process frees goes back to the kernel, and comes again page by page: on two cores of a virtual machine a state of
3 GB took 14 s to arrive in such memory and 0.7 s in memory that was there. A judge of a billion parameters fetches
thirty states of 13 GB.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_WORTH_KEEPING = 1 << 20  # bytes: smaller pieces the allocator keeps by itself
#: By size; None until somebody asks for it.
_free: dict[int, list[mmap.mmap]] | None = None


def keep() -> None:
    """Lets ``empty`` keep what it hands out until ``give_back``: of each size as much as was ever in use at once."""
    global _free
    _free = {} if _free is None else _free


def give_back() -> None:
    """Lets go of what nothing refers to."""
    if _free is not None:
        for free in _free.values():
            free.clear()


def make_room(shapes: Iterable[Sequence[int]]) -> None:
    """Fetches from the kernel what as many fp32 tensors will need at once, where memory is kept."""
    if _free is not None:
        room = [empty(shape).zero_() for shape in shapes]
        del room


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    if _free is None or nbytes < _WORTH_KEEPING:
        return torch.empty(shape, dtype=dtype)
    free = _free.setdefault(nbytes, [])
    try:
        memory = free.pop()
    except IndexError:
        memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    lent = memoryview(memory)
    weakref.finalize(lent, free.append, memory).atexit = False  # when the last tensor in it is gone
    return torch.frombuffer(lent, dtype=dtype).view(shape)
