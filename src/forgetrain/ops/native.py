"""The production schedule's C++ kernels, ``ops/cpu/*.cpp``, which stand in the engine's file.

GCC builds them, not torch's own compiler, which takes seconds of every process that imports it. Shapes as in
``forgetrain.ops.regions``; T is N · S.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.resources
import os
import re
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetrain.ops.products import product_torch, weight_gradient_torch


def kernel_source(name: str) -> str:
    """``ops/cpu/<name>.cpp`` with what it includes of that folder, for it stands alone in the engine's file."""
    folder = importlib.resources.files("forgetrain.ops.cpu")

    def included(match: re.Match[str]) -> str:
        return folder.joinpath(match[1]).read_text("utf-8")

    return re.sub(r'#include "(.+)"\n', included, folder.joinpath(f"{name}.cpp").read_text("utf-8"))


def gcc() -> tuple[str, str]:
    """The path of g++ and what it says of its version. Raises FileNotFoundError where there is none, or where it is
    another compiler: with another one's OpenMP beside torch's sums were wrong."""
    path = shutil.which("g++")
    version = path and subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    if not path or "Free Software Foundation" not in str(version):
        raise FileNotFoundError("its kernels are built by GCC's g++, which is not here: apt install g++")
    return path, str(version)


def kernel_folder() -> Path:
    """A folder of this user's alone, for what is in it is run. Raises OSError where there can be none."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()).resolve()
    folder /= f"forgetrain-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's alone: remove it, or set TORCHINDUCTOR_CACHE_DIR")
    return folder


def compiled(source: str, dtype: torch.dtype, definitions: str = "") -> ctypes.CDLL:
    """The library of a C++ text in which Number is this dtype, built where none is kept of that text, compiler and
    processor. Raises OSError where it cannot be built."""
    number = {torch.float32: "float", torch.bfloat16: "uint16_t"}[dtype]
    text = f"#include <cstdint>\ntypedef {number} Number;\n{definitions}{source}"
    compiler, version = gcc()
    command = [compiler, "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-fopenmp", "-fPIC", "-shared", "-x", "c++", "-"]
    about = ("model", "flags", "CPU", "Features")
    processor = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(about)}
    key = hashlib.sha256(repr((text, command, version, sorted(processor))).encode()).hexdigest()[:32]
    library = kernel_folder() / f"{key}.so"
    if not library.is_file():
        with library.with_name("lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks one builds
            if not library.is_file():
                made = library.with_name("made.so")  # what a killed one left there is built anew
                done = subprocess.run([*command, "-o", made], input=text, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise ChildProcessError(
                        f"{version.partition(chr(10))[0]} does not build a kernel:\n{done.stderr[-2000:]}"
                    )
                with made.open("rb") as whole_file:
                    os.fsync(whole_file.fileno())  # nobody looks into a library before it is loaded
                made.rename(library)
    return ctypes.CDLL(str(library))


def run_kernel(function: Any, *arguments: Tensor | float | None) -> None:
    """Calls a function of such a library: tensors are handed over by where they lie, counts as int64, others as
    double."""
    if function.argtypes is None:
        kinds = {int: ctypes.c_int64, float: ctypes.c_double}
        function.argtypes = [kinds.get(type(argument), ctypes.c_void_p) for argument in arguments]
        function.restype = None
    function(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])


def whole(dtype: torch.dtype, *tensors: Tensor) -> None:
    """Raises ValueError unless these lie without gaps, in this dtype: a kernel takes that for granted."""
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"a kernel for contiguous {dtype} cannot take {tensor.dtype} in strides {tensor.stride()}")


def compiled_attention(
    source: str, groups: int, heads_per_group: int, head_dim: int, scale: float, dtype: torch.dtype
) -> ctypes.CDLL:
    """The kernel for these sizes."""
    pairs = int(dtype == torch.bfloat16 and head_dim % 16 == 0 and heads_per_group % 2 == 0)
    sizes = f"constexpr int G = {groups}, R = {heads_per_group}, K = {head_dim};\nconstexpr float SCALE = {scale!r};"
    return compiled(source, dtype, f"#define PAIRS {pairs}\n{sizes}\n")


def attention_native_forward(
    kernel: ctypes.CDLL, qkv: Tensor, cos: Tensor, sin: Tensor, first: Tensor, s: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Causal attention of qkv, [T, columns of Q, K and V], in rows of ``s`` positions, Q and K turned on the way.
    cos and sin: fp32 [T, K], contiguous; first: int64 [T], the first key of its row that each position sees.
    -> (context [T, heads · K], the logarithms of the sums of exponentials, fp32 [T, heads])."""
    whole(qkv.dtype, qkv)
    whole(torch.float32, cos, sin)
    whole(torch.int64, first)
    context, log_sum = qkv.new_empty(qkv.shape[0], heads * cos.shape[-1]), cos.new_empty(qkv.shape[0], heads)
    run_kernel(kernel.kernel, qkv, cos, sin, first, context, log_sum, context, context, qkv.shape[0] // s, s, 0)
    return context, log_sum


def attention_native_backward(
    kernel: ctypes.CDLL, qkv: Tensor, cos: Tensor, sin: Tensor, first: Tensor, context: Tensor, log_sum: Tensor,
    d_context: Tensor, s: int,
) -> Tensor:  # fmt: skip
    """-> the gradient of qkv."""
    whole(qkv.dtype, qkv, context, d_context)
    whole(torch.float32, cos, sin, log_sum)
    whole(torch.int64, first)
    d_qkv = torch.empty_like(qkv)
    run_kernel(kernel.kernel, qkv, cos, sin, first, context, log_sum, d_context, d_qkv, qkv.shape[0] // s, s, 1)
    return d_qkv


def compiled_products(source: str, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel of products. None for bf16 where the processor multiplies it, which oneDNN makes use of, in
    torch.mm."""
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return None
    return compiled(source, dtype)


def product_native(kernel: ctypes.CDLL | None, a: Tensor, b: Tensor) -> Tensor:
    """a_MK · b_NKᵀ -> [M, N] in their dtype; both may be transposed views or parts of a matrix."""
    if kernel is None:
        return product_torch(a, b)
    if a.dtype != b.dtype or a.shape[1] != b.shape[1]:
        raise ValueError(f"no product of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty(m, n)
    sums = out if out.dtype == torch.float32 else out.new_empty(m, n, dtype=torch.float32)
    run_kernel(kernel.kernel, a, b, out, sums, m, n, k, *a.stride(), *b.stride()[::-1], 0, 0)
    return out


def weight_gradient_native(kernel: ctypes.CDLL | None, grad: Tensor, d_out: Tensor, x: Tensor, replace: bool) -> None:
    """d_out_TOᵀ · x_TI into grad_OI, fp32 and contiguous: in place of what is there, or added to it."""
    if kernel is None:
        return weight_gradient_torch(grad, d_out, x, replace)
    (k, m), n = d_out.shape, x.shape[1]
    if (d_out.dtype, k) != (x.dtype, x.shape[0]) or grad.shape != (m, n):
        raise ValueError(f"no gradient {tuple(grad.shape)} of {d_out.dtype} {(k, m)} and {x.dtype} {tuple(x.shape)}")
    whole(torch.float32, grad)
    run_kernel(kernel.kernel, d_out, x, d_out, grad, m, n, k, *d_out.stride()[::-1], *x.stride(), 1, int(replace))
    return None
