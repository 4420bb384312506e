"""Compiles the kernels that fp8 engines add or change for sm_90, without a GPU: python sm90.py → one line a kernel.

A process of its own, since a process whose kernels run under the interpreter cannot compile them.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from forgetrain.ops.cuda import fp8_block, fp8_tensor, rmsnorm, swiglu
from forgetrain.ops.cuda.largest import SLOTS

POINTERS = {
    "largest_ptr": "*i32",
    "unit_ptr": "*fp32",
    "turned_unit_ptr": "*fp32",
    "rstd_ptr": "*fp32",
    "partial_ptr": "*fp32",
}
FLOATS = ("branch_scale", "out_scale", "eps", "one")
NORM = {"D": 1536, "BLOCK": 2048, "ROWS": 2, "PLACES": SLOTS}
SWIGLU = {"F": 4608, "ROWS": 1, "COLS": 1024, "ALTERNATING": False, "PLACES": SLOTS}
QUANTISE = {"PLACES": SLOTS, "ROWS": 128, "COLS": 128, "UNIT_STEP": fp8_tensor.UNIT_STEP}
BLOCKS = {"TOP": 8, "SIDE": 128}
E4M3, E5M2 = ({"rows_ptr": kind, "turned_ptr": "*i32"} for kind in ("*fp8e4nv", "*fp8e5"))
CASES = [
    (fp8_tensor.largest_kernel, {"PLACES": SLOTS, "BLOCK": 8192}, {}, 8),
    (fp8_tensor.quantise_kernel, {**QUANTISE, "TOP": 8}, E4M3, 8),
    (fp8_tensor.quantise_kernel, {**QUANTISE, "TOP": 15}, E5M2, 8),
    (fp8_block.quantise_spans_kernel, BLOCKS, E4M3, 8),
    (fp8_block.quantise_squares_kernel, BLOCKS, E4M3, 8),
    (rmsnorm.add_norm_kernel, {**NORM, "HAS_BRANCH": True}, {}, 4),
    (rmsnorm.norm_backward_kernel, {**NORM, "HAS_RESIDUAL": True}, {}, 2),
    (swiglu.swiglu_kernel, SWIGLU, {}, 4),
    (swiglu.swiglu_backward_kernel, SWIGLU, {}, 4),
]


def mixed_up(ptx: str) -> int:
    """Pairs of fp8 numbers that are both joined with another pair and taken apart: ptxas 12.8 takes the wrong one's."""
    uses: dict[str, set[bool]] = {pair: set() for pair in re.findall(r"cvt\.rn\.satfinite\.\S+\s+(%rs\d+)", ptx)}
    for line in ptx.splitlines():
        for pair in re.findall(r"%rs\d+", line):
            if pair in uses and "cvt.rn.satfinite" not in line:
                uses[pair].add("mov.b32" in line)
    return sum(len(kinds) == 2 for kinds in uses.values())


def main() -> None:
    for kernel, constants, pointers, warps in CASES:
        signature, aligned = {}, {}
        for i, name in enumerate(kernel.arg_names):
            kind = "constexpr" if name in constants else {**POINTERS, **pointers}.get(name)
            signature[name] = kind or ("*bf16" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32")
            if name not in constants and name not in FLOATS:
                aligned[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        ptx = found.asm["ptx"]
        instructions = sorted(set(re.findall(r"cvt\.rn\.satfinite\.\S+|(?:ld|st)\.global\S+|\batom\.\S+", ptx)))
        facts = {"kernel": kernel.__name__, "cubin": len(found.asm["cubin"]), "shared": found.metadata.shared}
        print(json.dumps({**facts, "instructions": instructions, "mixed_up": mixed_up(ptx)}))


if __name__ == "__main__":
    main()
