"""The switches that make a process repeatable, and the fingerprint of what its bits depend on."""

from __future__ import annotations

import os
import platform

import torch

from forgetrain.engine.serve import deterministic_algorithms

#: What CUDA and NCCL need in the environment of a process before it starts, for gates G0 to G3.
CUDA_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
}


def set_cuda_environment() -> None:
    """``CUDA_ENVIRONMENT`` for this process, where its user has not set it; before cuBLAS and NCCL start."""
    for key, value in CUDA_ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def make_deterministic(threads: int, device: str) -> None:
    """Pins the thread count (bits of fp32 products depend on it) and asks torch for deterministic algorithms only.
    For ``cuda`` it has to be called before cuBLAS starts, which reads its workspaces' sizes from the environment."""
    if device == "cuda":
        set_cuda_environment()
    torch.set_num_threads(threads)
    deterministic_algorithms(True)
    # filling fresh memory costs time and changes no result of an engine that writes what it reads
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def fingerprint(*, device: str, threads: int, ranks: int = 1) -> dict[str, str | int]:
    """What golden records are keyed by: torch without its local suffix, thread count, processor or GPU, ranks."""
    processor = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "torch": torch.__version__.partition("+")[0],
        "device": device,
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "ranks": ranks,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
