"""Whether this machine is the one that a target asks for: said in one line, before anything expensive starts.

check_device(target.hardware)          # raises UserError on another GPU, an old driver, too little memory
release("cuda")                        # gives back GPU memory that this process does not use
this_gpu()                             # "h200": the name in spec.hardware of the GPU that torch sees, or None
"""

from __future__ import annotations

import importlib.metadata

import torch

from forgetrain.errors import UserError
from forgetrain.spec.hardware import HARDWARE, hardware_of
from forgetrain.spec.target import Hardware

#: The oldest Triton whose kernels were measured, and the oldest cuDNN with attention for Hopper, as torch counts it.
TRITON = (3, 6)
CUDNN = 90000


def this_gpu() -> str | None:
    """The key in HARDWARE of the first GPU, or None: no GPU, or one that the table does not know."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    return next((key for key, device in HARDWARE.items() if name.startswith(device.cuda_names or ("\0",))), None)


def release(device: str) -> None:
    """Gives back what this process took of a GPU and does not use: engines' processes share it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def check_device(hardware: Hardware) -> None:
    """Raises UserError when a target for a GPU cannot run here: a CPU build of torch, no driver or one that is too old,
    another GPU than the target's, memory that is not there, a Triton or cuDNN that is too old. A CPU always can."""
    if hardware.device == "cpu":
        return
    _require_cuda(hardware)
    wanted, name = hardware_of(hardware), torch.cuda.get_device_name(0)
    if not name.startswith(wanted.cuda_names):
        here = this_gpu()
        remedy = f"--set hardware.name={here}" if here else "add it to spec/hardware.py"
        raise UserError(f"the GPU here is {name}", key="hardware.name", value=hardware.name, remedy=remedy)
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if hardware.memory_gib is not None and hardware.memory_gib > memory:
        raise UserError(
            f"the GPU here has {memory:.0f} GiB",
            key="hardware.memory_gib",
            value=hardware.memory_gib,
            remedy="lower it",
        )
    _require_versions()


def _require_cuda(hardware: Hardware) -> None:
    key, value = "hardware.name", hardware.name
    if torch.version.cuda is None:
        raise UserError(
            f"torch {torch.__version__} is a build without CUDA",
            key=key,
            value=value,
            remedy="install torch's CUDA build, or --set hardware.name=cpu",
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, one that is too old, a GPU that is not to be had
        reason = str(error).splitlines()[0]
        raise UserError(
            f"CUDA does not start: {reason}", key=key, value=value, remedy="install a driver for it, see nvidia-smi"
        ) from None


def _require_versions() -> None:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    if triton == "none" or tuple(int(part) for part in triton.split(".")[:2]) < TRITON:
        raise UserError(
            f"Triton {TRITON[0]}.{TRITON[1]} or newer is needed, there is {triton}",
            key="hardware.name",
            remedy="install torch 2.11 or newer, which brings it",
        )
    cudnn = torch.backends.cudnn.version() or 0
    if cudnn < CUDNN:
        raise UserError(
            f"cuDNN 9 or newer is needed for its attention, torch has {cudnn or 'none'}",
            key="hardware.name",
            remedy="install torch 2.11 or newer, which brings it",
        )
