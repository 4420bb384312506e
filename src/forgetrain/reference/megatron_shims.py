"""What megatron-core needs changed to run on a CPU, applied in the reference's own process and nowhere else.

megatron-core asks for CUDA in four places that no setting reaches. Each shim has a name, which goes into the golden
record's manifest; none changes any arithmetic. On a GPU none of them is applied; where two ranks share one, which NCCL
refuses, they reduce over Gloo, and that needs one of its own.

``compiled_when_called`` is no shim: it changes what importing megatron-core costs, and nothing that it does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch

SHIMS = {
    "current_device": "torch.cuda.current_device answers with the CPU",
    "rng_fork": "the CUDA RNG tracker's fork is a null context: there is no dropout",
    "cuda_tensors": "tensors that are asked for on 'cuda' are made on the CPU",
    "type_names": "Tensor.type() names CPU tensors as it names CUDA tensors",
}
SHARED_GPU = {"coalescing": "collectives of several buckets run one after the other: Gloo has none for CUDA tensors"}


def shims_of(device: str) -> dict[str, str]:
    """The shims that runs on this machine need, at any number of ranks up to two."""
    if device == "cpu":
        return SHIMS
    return SHARED_GPU if torch.cuda.device_count() < 2 else {}


def share_gpu() -> None:
    """Applies ``SHARED_GPU`` to this process."""
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer._coalescing_manager = _one_by_one  # type: ignore[attr-defined]


@contextlib.contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[None]:
    yield


@contextlib.contextmanager
def compiled_when_called() -> Iterator[None]:
    """megatron-core is imported in this block: what it marks for torch.compile is given to that at its first call.

    Marking alone imports TorchInductor, a third of what starting a process of this reference costs, and the local
    layers call nothing that is marked."""
    compile_now = torch.compile

    def compile_late(model: Any = None, **options: Any) -> Any:
        if not isinstance(model, FunctionType) or options:
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_late
    try:
        yield
    finally:
        torch.compile = compile_now


def apply_shims() -> None:
    """Applies all of ``SHIMS`` to this process, once."""
    from megatron.core.tensor_parallel import random

    if getattr(torch.cuda.current_device, "is_shim", False):
        return
    torch.cuda.current_device = _current_device
    random.get_cuda_rng_tracker().fork = _no_fork  # type: ignore[method-assign]
    for name in ("empty", "full", "ones", "tensor", "zeros"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.type = _type_as_cuda(torch.Tensor.type)  # type: ignore[method-assign]


def _current_device() -> torch.device:
    return torch.device("cpu")


_current_device.is_shim = True  # type: ignore[attr-defined]


def _no_fork(*_: Any, **__: Any) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()


def _on_cpu(function: Callable) -> Callable:
    def made_on_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return made_on_cpu


def _type_as_cuda(original: Callable) -> Callable:
    def type_as_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return type_as_cuda
