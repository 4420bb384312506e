"""What the machine has left, and what this process took of it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")


def available_memory(meminfo: Path = _MEMINFO) -> int | None:
    """Bytes of host memory that can be taken without swapping (MemAvailable); None where the system does not say."""
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return None


def free_device_memory(device: str) -> int | None:
    """Bytes that are free on this rank's device: the GPU's own memory, or the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else available_memory()


def memory_left(device: str) -> str:
    """For the progress line; empty where the system does not say."""
    free = free_device_memory(device)
    return "" if free is None else f"  {free / 2**30:.1f} GiB free"


def peak_memory(device: str) -> int:
    """The most bytes that this process held at once so far: of tensors on the GPU, or on a CPU of the whole process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
