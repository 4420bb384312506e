"""What the machines can do: one table, with the source of every figure. Pure data; nothing here asks a device.

    HARDWARE["h200"].peak("bf16")      # 989.4e12 FLOP/s
    hardware_of(target).bandwidth      # bytes/s, of one device

Peaks are those of dense products with fp32 accumulation, without sparsity; they are what MFU divides by. Bandwidth is
what a copy kernel reaches where somebody measured it, else the datasheet's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from forgetrain.errors import UserError

if TYPE_CHECKING:
    from forgetrain.spec.target import Hardware  # which looks its name up here

Dtype = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class Device:
    """One GPU, or one thread of a CPU. ``bf16``, ``fp32`` and ``fp8`` (None: it has none) in TFLOP/s, ``memory_gib`` in
    GiB (None: the machine's),
    ``terabytes`` of memory traffic in TB/s. ``cuda_names`` are how the CUDA driver's name of such a device begins.
    ``is_bound`` says that no honest run is faster; a CPU's figures are those of one machine, so they bound nothing."""

    bf16: float
    fp32: float
    memory_gib: float | None
    terabytes: float
    source: str
    cuda_names: tuple[str, ...] = ()
    is_bound: bool = True
    fp8: float | None = None

    def peak(self, dtype: Dtype) -> float:
        """FLOP/s of dense products of operands in ``dtype``. Raises UserError for fp8 where there is none."""
        rate = getattr(self, dtype)
        if rate is None:
            remedy = "set it to 'bf16', or hardware.name to a GPU that has"
            raise UserError("this hardware has no fp8 products", key="precision.dtype", value=dtype, remedy=remedy)
        return rate * 1e12

    @property
    def bandwidth(self) -> float:
        """Bytes a second to and from main memory."""
        return self.terabytes * 1e12


HARDWARE: dict[str, Device] = {
    "cpu": Device(
        bf16=0.200,
        fp32=0.075,
        memory_gib=None,
        terabytes=0.012,
        source="measured: matrix products and copies on one of two cores of an AMD Zen 4 with AVX-512-BF16",
        is_bound=False,
    ),
    "a100": Device(
        bf16=312.0,
        fp32=19.5,
        memory_gib=79.0,
        terabytes=2.039,
        source="NVIDIA A100 datasheet, 80 GB SXM",
        cuda_names=("NVIDIA A100-SXM4-80GB",),
    ),
    "h100": Device(
        bf16=989.4,
        fp32=66.9,
        memory_gib=79.0,
        terabytes=3.35,
        source="NVIDIA H100 datasheet, 80 GB SXM",
        fp8=1978.9,
        cuda_names=("NVIDIA H100 80GB",),
    ),
    "h200": Device(
        bf16=989.4,
        fp32=66.9,
        memory_gib=139.0,
        terabytes=4.3,
        source="NVIDIA H200 datasheet, 141 GB SXM; bandwidth measured with copies (datasheet: 4.8 TB/s)",
        fp8=1978.9,
        cuda_names=("NVIDIA H200",),
    ),
    "b200": Device(
        bf16=2250.0,
        fp32=75.0,
        memory_gib=178.0,
        terabytes=8.0,
        source="NVIDIA DGX B200 datasheet, one GPU of eight, 180 GB",
        fp8=4500.0,
        cuda_names=("NVIDIA B200",),
    ),
    "rtx4090": Device(
        bf16=165.2,
        fp32=82.6,
        memory_gib=23.5,
        terabytes=1.008,
        source="NVIDIA Ada GPU architecture paper, GeForce RTX 4090",
        fp8=330.3,
        cuda_names=("NVIDIA GeForce RTX 4090",),
    ),
}


def hardware_of(hardware: Hardware, *, file: object = None) -> Device:
    """The table's device for a target's ``[hardware]``, with the target's own ``memory_gib`` when it names one.

    Raises:
        UserError: the table has no such device.
    """
    if hardware.name not in HARDWARE:
        raise UserError(
            "no such hardware",
            file=file,
            key="hardware.name",
            value=hardware.name,
            remedy=f"choose one of {', '.join(HARDWARE)}, or add it to spec/hardware.py",
        )
    device = HARDWARE[hardware.name]
    if hardware.memory_gib is None:
        return device
    return replace(device, memory_gib=hardware.memory_gib)


def units(hardware: Hardware) -> int:
    """How many of the table's devices a target's ``[hardware]`` has: GPUs, or on a CPU the threads of all ranks."""
    return hardware.count * (hardware.threads if hardware.device == "cpu" else 1)
