"""Triton's interpreter, made to round as a GPU does.

Its own conversions cut fp32 to bf16 short, and lose the carry where a number rounds up to the next power of two of an
fp8 type. Engines that compute in bf16 or fp8 need the real ones, which torch has.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_BITS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


def round_to_nearest() -> None:
    """From now on, in this process."""
    interpreter._convert_float = _convert


def _convert(data: np.ndarray, source: tl.dtype, goal: tl.dtype, _: object) -> np.ndarray:
    before, after = _TYPES[source], _TYPES[goal]
    held = np.frombuffer(data.tobytes(), dtype=_BITS[before.itemsize][1]).copy()
    numbers = torch.from_numpy(held).view(before).to(after).view(_BITS[after.itemsize][0])
    return numbers.numpy().view(_BITS[after.itemsize][1]).reshape(data.shape)
