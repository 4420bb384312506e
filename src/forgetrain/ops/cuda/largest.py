"""The largest magnitude of what a kernel writes, gathered on the way: fp8 operands are scaled by it.

A magnitude is the bits of an fp32 number without its sign, int32: in the order of the numbers, infinity above all
finite ones and NaN above it, and the largest of many is the same in whatever order they come. Programs share SLOTS
places, since at a single one they would wait for each other; who reads takes the largest of all.
"""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
# What a kernel's arguments are inside it: Triton's own types do not know.

from __future__ import annotations

import triton
import triton.language as tl

SLOTS = 128


@triton.jit
def magnitude(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def note_largest(largest_ptr, x, PLACES: tl.constexpr):
    tl.atomic_max(largest_ptr + tl.program_id(0) % PLACES, tl.max(magnitude(x)), sem="relaxed")
