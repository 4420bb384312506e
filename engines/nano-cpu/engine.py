"""A pre-training engine for nano-cpu, written by ForgeTrain: forward, loss, backward, update.

Plan:
    schedule = production
    products = native
    regions = native
    attention_kernel = native
    head_rows = 512
    optimizer_state = sharded
    rope_tables = fp32
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 4096,
    "rope_theta": 5000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "qk_norm": False,
    "scale_emb": None,
    "scale_depth": None,
    "dim_model_base": None,
}
DOCUMENTS = "ignore"
LAYERS, GROUPS, HEADS_PER_GROUP, HEAD_DIM = 7, 2, 8, 32
HIDDEN, INTERMEDIATE, VOCAB = 256, 768, 4096
Q_WIDTH, KV_WIDTH = GROUPS * HEADS_PER_GROUP * HEAD_DIM, GROUPS * HEAD_DIM
EPS, ROPE_THETA, ATTENTION_SCALE = 1e-06, 5000000.0, HEAD_DIM**-0.5
RESIDUAL_SCALE = 1.0
HEAD_ROWS = 512  # tokens whose logits exist at a time

# ---------------------------------------------------------------------------------------------------------------------
# Ops. Shapes: T tokens, D hidden, F intermediate, N rows, S positions, G groups, R heads per group, K head_dim.


def rope_tables_fp32_forward(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Angles in fp32 from 1 / theta^(2i/K), formed where the positions are."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / (theta**exponents))
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def whole(dtype: torch.dtype, *tensors: Tensor) -> None:
    """Raises ValueError unless these lie without gaps, in this dtype: a kernel takes that for granted."""
    for tensor in tensors:
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"a kernel for contiguous {dtype} cannot take {tensor.dtype} in strides {tensor.stride()}")


def run_kernel(function: Any, *arguments: Tensor | float | None) -> None:
    """Calls a function of such a library: tensors are handed over by where they lie, counts as int64, others as
    double."""
    if function.argtypes is None:
        kinds = {int: ctypes.c_int64, float: ctypes.c_double}
        function.argtypes = [kinds.get(type(argument), ctypes.c_void_p) for argument in arguments]
        function.restype = None
    function(*[argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments])


def norm_native(kernels: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out, inverse = torch.empty_like(x), x.new_empty(rows, 1, dtype=torch.float32)
    whole(x.dtype, x, weight)
    run_kernel(kernels.norm, x, None, weight, None, out, inverse, rows, width, float(eps), 1.0)
    return out, inverse


def residual_norm_native(
    kernels: ctypes.CDLL, x: Tensor, branch: Tensor, weight: Tensor, eps: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    total, out, inverse = torch.empty_like(x), torch.empty_like(x), x.new_empty(rows, 1, dtype=torch.float32)
    whole(x.dtype, x, branch, weight)
    run_kernel(kernels.norm, x, branch, weight, total, out, inverse, rows, width, float(eps), float(scale))
    return total, out, inverse


def norm_backward_native(
    kernels: ctypes.CDLL, x: Tensor, inverse: Tensor, weight: Tensor, d_out: Tensor, d_residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    d_x, d_weight = torch.empty_like(x), x.new_empty(width, dtype=torch.float32)
    span = 32
    sums = x.new_empty(-(-rows // span), width, dtype=torch.float32)
    whole(x.dtype, x, weight, d_out, *(() if d_residual is None else (d_residual,)))
    whole(torch.float32, inverse)
    run_kernel(kernels.norm_backward, x, inverse, weight, d_out, d_residual, d_x, d_weight, sums, rows, width, span)
    return d_x, d_weight


def swiglu_native(kernels: ctypes.CDLL, gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    whole(gate_up.dtype, gate_up)
    run_kernel(kernels.swiglu, gate_up, out, rows, width)
    return out


def swiglu_backward_native(kernels: ctypes.CDLL, gate_up: Tensor, d_out: Tensor) -> Tensor:
    d_gate_up = torch.empty_like(gate_up)
    whole(gate_up.dtype, gate_up, d_out)
    run_kernel(kernels.swiglu_backward, gate_up, d_out, d_gate_up, *d_out.shape)
    return d_gate_up


def entropy_native(kernels: ctypes.CDLL, logits: Tensor, labels: Tensor, d_nll: Tensor) -> Tensor:
    nll = torch.empty_like(d_nll)
    whole(logits.dtype, logits)
    whole(torch.int64, labels)
    whole(torch.float32, d_nll)
    run_kernel(kernels.entropy, logits, labels, d_nll, nll, *logits.shape)
    return nll


def adamw_native(
    kernels: ctypes.CDLL,
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    rounded: Tensor | None,
    factor: Tensor,
    rates: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    whole(torch.float32, p, g, m, v, factor, rates)
    whole(torch.bfloat16, *(() if rounded is None else (rounded,)))
    numbers = map(float, (beta1, beta2, eps))
    run_kernel(kernels.adamw, p, g, m, v, rounded, factor, rates, p.numel(), *numbers)


def norm_blocked(flat: Tensor, block: int = 4096) -> Tensor:
    """‖flat‖₂ as the norm of its blocks' norms, fp32 []: one fp32 sum over 10⁷ numbers would lose digits."""
    whole = flat.numel() // block * block
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, block), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return torch.linalg.vector_norm(torch.cat((blocks, rest[None])))


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


def product_torch(a: Tensor, b: Tensor) -> Tensor:
    """a_MK · b_NKᵀ -> [M, N] in their dtype."""
    return torch.mm(a, b.t())


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


def weight_gradient_torch(grad: Tensor, d_out: Tensor, x: Tensor, replace: bool) -> None:
    """d_out_TOᵀ · x_TI into grad_OI, fp32: in place of what is there, or added to it."""
    if d_out.dtype == torch.float32:
        grad.addmm_(d_out.t(), x, beta=0.0 if replace else 1.0)
    elif replace:
        grad.copy_(torch.mm(d_out.t(), x))
    else:
        grad.add_(torch.mm(d_out.t(), x))


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


ATTENTION_SOURCE = r"""
// Causal attention with grouped queries on a CPU: R query heads share a key head, so the R rows of one position meet the
// same keys and form one small product. Scores never leave the caches; the backward pass forms them again from the
// logarithm of their sum (FlashAttention-2, arXiv 2307.08691). Sums are fp32. bf16 numbers are multiplied in pairs where
// the processor can (AVX-512-BF16), for which probabilities and their gradients are rounded to bf16; else in fp32.
//
// The engine's file defines G key heads a token, R query heads of each, K numbers a head, SCALE of the scores, Number, and
// whether these sizes allow for pairs (PAIRS) before this text. Columns of qkv are [Q, K, V]; RoPE turns Q and K on the way in and their
// gradients on the way out, by the cosines and sines of [positions, K], the same in both halves. first[position] is the
// first key that a position sees.
#pragma GCC optimize("fp-contract=fast")
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if PAIRS && defined(__AVX512BF16__)
#include <immintrin.h>
#define PAIRED
#endif

#ifdef __AVX512F__
constexpr int WIDEST = 16;
#else
constexpr int WIDEST = 8;  // of two registers, vectors are 3.6 times as slow
#endif
constexpr int W = K % WIDEST == 0 ? WIDEST : K % 8 == 0 ? 8 : K % 4 == 0 ? 4 : 2;  // numbers a vector
constexpr int TILE = 2 * W, C = K / W, Q_WIDTH = G * R * K, STRIDE = Q_WIDTH + 2 * G * K;
constexpr int64_t SPAN = 16;  // positions whose share of dK and dV is summed apart, for the digits' sake
// Sums of RS rows and CS vectors of each stay in registers, beside what is multiplied: in 24 of 32, or in 8 of 16.
constexpr int part(int count, int most) { return most >= count ? count : count % most ? part(count, most - 1) : most; }
constexpr int SUMS = W == 16 ? 24 : 8, RS = part(R, SUMS / 2), CS = part(C, SUMS / RS);
// Single numbers: bf16 widened to fp32, and fp32 rounded to nearest even on the way back. Loops over them are vectors.
static inline float wide(float x) { return x; }
static inline float wide(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
static inline void narrow(float x, float* p) { *p = x; }
static inline void narrow(float x, uint16_t* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = x == x ? bits : 0x7fc0;
}

// exp of x <= 0, to about 1e-7: 2^n · e^r with |r| <= ln 2 / 2; e^-87, or 1.6e-38, for all below, and NaN for NaN. Of a
// number or of a vector of them, Int being as many whole numbers.
template <typename To, typename From> static inline To converted(From x) {
    if constexpr (std::is_arithmetic_v<From>) return To(x);
    else return __builtin_convertvector(x, To);
}
template <typename Int, typename Real> static inline Real exponential(Real x) {
    x = x < -87.0f ? Real{} - 87.0f : x;
    Real n = converted<Real>(converted<Int>(x * 1.44269504f - 0.5f));
    Real r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Real p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Int bits = (converted<Int>(n) + 127) << 23;
    Real power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}
// Vectors of W numbers, which is defined before this text: fp32 as they lie, and bf16 rounded to nearest even.
typedef float Lanes __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));

static inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
static inline void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }
static inline void narrow(Lanes x, float* p) { store(p, x); }
static inline void narrow(Lanes x, uint16_t* p) {
    Whole bits = (Whole)x;
    Whole even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(x == x ? even : Whole{} + 0x7fc0, Halves);
}

static inline Lanes wide(const float* p) { return load(p); }
static inline Lanes wide(const uint16_t* p) {
    return (Lanes)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Whole) << 16);
}

static const Whole COUNT = [] { Whole x; for (int l = 0; l < W; l++) x[l] = l; return x; }();

// Which of the keys from j on a position sees: all bits of a lane, or none.
static inline Whole seen(int64_t j, int64_t from, int64_t position) {
    Whole key = COUNT + int32_t(j);
    return (key >= int32_t(from)) & (key <= int32_t(position));
}

static inline void rows_of(const Number* x, int64_t count, int64_t stride, float* out) {
    for (int64_t i = 0; i < count; i++) for (int c = 0; c < C; c++) store(out + i * K + c * W, wide(x + i * stride + c * W));
}

// A head x_K turned by the angles of one position, times scale; sign -1 turns back.
static inline void rope(float* __restrict x, const float* __restrict cos, const float* __restrict sin, float sign,
                        float scale) {
    for (int d = 0; d < K / 2; d++) {
        float a = x[d], b = x[d + K / 2], c = cos[d] * scale, w = sin[d] * sign * scale;
        x[d] = a * c - b * w;
        x[d + K / 2] = b * c + a * w;
    }
}

static inline void narrow_rows(const float* x, int64_t count, Number* out) {
    for (int64_t i = 0; i < count * K; i += W) narrow(load(x + i), out + i);
}

#ifdef PAIRED
typedef uint32_t Cell;  // two bf16, which one instruction multiplies and adds
constexpr int PER = 2;

static inline Lanes times(Lanes sum, Cell a, __m512i b) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int32_t(a)), (__m512bh)b);
}
static inline __m512i rounded(const float* low, const float* high) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)load(high), (__m512)load(low));
}
static inline __m512i braided(const float* low, const float* high) {  // the cells of two rows
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rounded(low, high));
}
#else
typedef float Cell;
constexpr int PER = 1;
#endif
typedef std::vector<Cell> Cells;

// x_K, an even count of rows, as cells: of neighbours in a row.
static inline void along(const float* x, int64_t count, Cell* out) {
#ifdef PAIRED
    for (int64_t i = 0; i < count * K; i += 2 * W) _mm512_storeu_si512(out + i / 2, rounded(x + i, x + i + W));
#else
    std::copy_n(x, count * K, out);
#endif
}

// ... of neighbours in a column.
static inline void down(const float* x, int64_t count, Cell* out) {
#ifdef PAIRED
    for (int64_t i = 0; i < count; i += 2)
        for (int d = 0; d < K; d += W)
            _mm512_storeu_si512(out + i / 2 * K + d, braided(x + i * K + d, x + (i + 1) * K + d));
#else
    std::copy_n(x, count * K, out);
#endif
}

// ... of neighbours in a row, transposed to [width / TILE, K / PER, TILE]: in [K / PER, width] a tile's numbers would lie
// whole pages apart, and all of them in the same few sets of L1.
static void turned(const float* x, int64_t count, int64_t width, Cell* out) {
    Cells flat((count + 1) * K / PER);
    along(x, count + count % PER, flat.data());
    for (int d = 0; d < K / PER; d++)
        for (int64_t j = 0; j < width; j++)
            out[j / TILE * TILE * (K / PER) + d * TILE + j % TILE] = j < count ? flat[j * (K / PER) + d] : Cell{};
}

// R rows of a (along) · TILE columns of bt (turned).
static inline void tile(const Cell* a, const Cell* bt, Lanes (&out)[R][2]) {
#ifdef PAIRED
    for (int r = 0; r < R; r++) out[r][0] = out[r][1] = Lanes{};
    for (int d = 0; d < K / PER; d++)
        for (int h = 0; h < 2; h++) {
            __m512i x = _mm512_loadu_si512(bt + d * TILE + h * W);
            for (int r = 0; r < R; r++) out[r][h] = times(out[r][h], a[r * (K / 2) + d], x);
        }
#else
    for (int top = 0; top < R; top += RS) {
        Lanes sum[RS][2];
        for (int r = 0; r < RS; r++) sum[r][0] = sum[r][1] = Lanes{};
        for (int d = 0; d < K; d++) {
            Lanes x = load(bt + d * TILE), y = load(bt + d * TILE + W);
            for (int r = 0; r < RS; r++) sum[r][0] += a[(top + r) * K + d] * x, sum[r][1] += a[(top + r) * K + d] * y;
        }
        for (int r = 0; r < RS; r++) out[top + r][0] = sum[r][0], out[top + r][1] = sum[r][1];
    }
#endif
}

// R rows of p · the rows [from, to) of b_K (down). Outside of that range p is zero up to whole tiles.
static inline void gather(const float* p, int64_t width, const Cell* b, int64_t from, int64_t to, Cell* scratch,
                          Lanes (&out)[R][C]) {
#ifdef PAIRED
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) out[r][c] = Lanes{};
    for (int r = 0; r < R; r++)
        for (int64_t j = from / TILE * TILE; j < to; j += TILE)
            _mm512_storeu_si512(scratch + (r * width + j) / 2, rounded(p + r * width + j, p + r * width + j + W));
    for (int64_t j = from / 2; j < (to + 1) / 2; j++)
        for (int c = 0; c < C; c++) {
            __m512i x = _mm512_loadu_si512(b + j * K + c * W);
            for (int r = 0; r < R; r++) out[r][c] = times(out[r][c], scratch[r * width / 2 + j], x);
        }
#else
    for (int top = 0; top < R; top += RS)
        for (int left = 0; left < C; left += CS) {
            Lanes sum[RS][CS];
            for (int r = 0; r < RS; r++) for (int c = 0; c < CS; c++) sum[r][c] = Lanes{};
            for (int64_t j = from; j < to; j++)
                for (int c = 0; c < CS; c++) {
                    Lanes x = load(b + j * K + (left + c) * W);
                    for (int r = 0; r < RS; r++) sum[r][c] += p[(top + r) * width + j] * x;
                }
            for (int r = 0; r < RS; r++) for (int c = 0; c < CS; c++) out[top + r][left + c] = sum[r][c];
        }
#endif
}

// The rows [from, to) of sum_K += pᵀ · a, R rows (down).
static inline void scatter(const float* p, int64_t width, const Cell* a, int64_t from, int64_t to, Cell* scratch,
                           float* sum) {
#ifdef PAIRED
    for (int r = 0; r < R; r += 2)
        for (int64_t j = from / W * W; j < to; j += W)
            _mm512_storeu_si512(scratch + r / 2 * width + j, braided(p + r * width + j, p + (r + 1) * width + j));
    const Cell* weights = scratch;
    __m512i rows[R / 2][C];
    for (int r = 0; r < R / 2; r++) for (int c = 0; c < C; c++) rows[r][c] = _mm512_loadu_si512(a + r * K + c * W);
#else
    const Cell* weights = p;
    Lanes rows[R][C];
    for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) rows[r][c] = load(a + r * K + c * W);
#endif
    for (int64_t j = from; j < to; j++)
        for (int c = 0; c < C; c++) {
            Lanes x = load(sum + j * K + c * W);
            for (int r = 0; r < R / PER; r++)
#ifdef PAIRED
                x = times(x, weights[r * width + j], rows[r][c]);
#else
                x += weights[r * width + j] * rows[r][c];
#endif
            store(sum + j * K + c * W, x);
        }
}

static void forward(const Number* qkv, const float* cos, const float* sin, const int64_t* first, Number* out,
                    float* log_sum, int64_t n, int64_t s) {
    int64_t width = (s + TILE - 1) / TILE * TILE;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < n * G; task++) {
        int64_t row = task / G, g = task % G;
        const Number* base = qkv + row * s * STRIDE;
        std::vector<float> k((s + 1) * K), v((s + 1) * K), p(R * width);  // a row more: pairs need an even count
        Cells kt(K * width / PER), v_rows((s + 1) * K), q_row(R * K), scratch(R * width);
        rows_of(base + Q_WIDTH + g * K, s, STRIDE, k.data());
        rows_of(base + Q_WIDTH + (G + g) * K, s, STRIDE, v.data());
        for (int64_t i = 0; i < s; i++) rope(&k[i * K], cos + (row * s + i) * K, sin + (row * s + i) * K, 1, 1);
        turned(k.data(), s, width, kt.data());
        down(v.data(), s + s % PER, v_rows.data());
        for (int64_t i = 0; i < s; i++) {
            float q[R * K];
            rows_of(base + i * STRIDE + g * R * K, R, K, q);
            for (int r = 0; r < R; r++) rope(q + r * K, cos + (row * s + i) * K, sin + (row * s + i) * K, 1, SCALE);
            along(q, R, q_row.data());
            int64_t from = first[row * s + i], start = from / TILE * TILE, end = i / TILE * TILE + TILE;
            Lanes most[R], total[R];
            for (int r = 0; r < R; r++) most[r] = Lanes{} - INFINITY;
            for (int64_t j = start; j < end; j += TILE) {
                Lanes t[R][2];
                tile(q_row.data(), kt.data() + j * (K / PER), t);
                for (int h = 0; h < 2; h++) {
                    Whole open = seen(j + h * W, from, i);
                    for (int r = 0; r < R; r++) {
                        t[r][h] = open ? t[r][h] : Lanes{} - INFINITY;
                        most[r] = most[r] > t[r][h] ? most[r] : t[r][h];
                        store(p.data() + r * width + j + h * W, t[r][h]);
                    }
                }
            }
            for (int r = 0; r < R; r++) {
                float top = most[r][0];
                for (int l = 1; l < W; l++) top = std::max(top, most[r][l]);
                total[r] = Lanes{};
                for (int64_t j = start; j < end; j += W) {
                    Lanes s0 = load(p.data() + r * width + j);
                    Lanes e = s0 == -INFINITY ? Lanes{} : exponential<Whole>(s0 - top);
                    total[r] += e;
                    store(p.data() + r * width + j, e);
                }
                float sum = 0;
                for (int l = 0; l < W; l++) sum += total[r][l];
                total[r] = Lanes{} + 1.0f / sum;
                log_sum[((row * s + i) * G + g) * R + r] = top + std::log(sum);
            }
            Lanes o[R][C];
            gather(p.data(), width, v_rows.data(), from, i + 1, scratch.data(), o);
            float context[R * K];
            for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) store(context + r * K + c * W, o[r][c] * total[r]);
            narrow_rows(context, R, out + (row * s + i) * Q_WIDTH + g * R * K);
        }
    }
}

static void backward(const Number* qkv, const float* cos, const float* sin, const int64_t* first, const Number* out,
                     const float* log_sum, const Number* d_out, Number* d_qkv, int64_t n, int64_t s) {
    int64_t width = (s + TILE - 1) / TILE * TILE;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < n * G; task++) {
        int64_t row = task / G, g = task % G;
        const Number* base = qkv + row * s * STRIDE;
        std::vector<float> k((s + 1) * K), v((s + 1) * K), p(R * width), ds(R * width);
        Cells kt(K * width / PER), vt(K * width / PER), k_rows((s + 1) * K), scratch(R * width);
        Cells q_row(R * K), q_down(R * K), go_row(R * K), go_down(R * K);
        std::vector<float> dk(s * K), dv(s * K), dk_part(s * K), dv_part(s * K);
        rows_of(base + Q_WIDTH + g * K, s, STRIDE, k.data());
        rows_of(base + Q_WIDTH + (G + g) * K, s, STRIDE, v.data());
        for (int64_t i = 0; i < s; i++) rope(&k[i * K], cos + (row * s + i) * K, sin + (row * s + i) * K, 1, 1);
        turned(k.data(), s, width, kt.data());
        turned(v.data(), s, width, vt.data());
        down(k.data(), s + s % PER, k_rows.data());
        for (int64_t i = 0; i < s; i++) {
            float q[R * K], o[R * K], go[R * K], delta[R];
            int64_t at = (row * s + i) * Q_WIDTH + g * R * K;
            rows_of(base + i * STRIDE + g * R * K, R, K, q);
            rows_of(out + at, R, K, o);
            rows_of(d_out + at, R, K, go);
            for (int r = 0; r < R; r++) rope(q + r * K, cos + (row * s + i) * K, sin + (row * s + i) * K, 1, SCALE);
            along(q, R, q_row.data()), down(q, R, q_down.data());
            along(go, R, go_row.data()), down(go, R, go_down.data());
            for (int r = 0; r < R; r++) {
                Lanes x{};
                for (int c = 0; c < C; c++) x += load(o + r * K + c * W) * load(go + r * K + c * W);
                delta[r] = 0;
                for (int l = 0; l < W; l++) delta[r] += x[l];
            }
            const float* lse = log_sum + ((row * s + i) * G + g) * R;
            int64_t from = first[row * s + i], end = i / TILE * TILE + TILE;
            for (int64_t j = from / TILE * TILE; j < end; j += TILE) {
                Lanes t[R][2];
                tile(q_row.data(), kt.data() + j * (K / PER), t);
                for (int h = 0; h < 2; h++) {
                    Whole open = seen(j + h * W, from, i);
                    for (int r = 0; r < R; r++)
                        store(p.data() + r * width + j + h * W, open ? exponential<Whole>(t[r][h] - lse[r]) : Lanes{});
                }
                tile(go_row.data(), vt.data() + j * (K / PER), t);
                for (int h = 0; h < 2; h++)
                    for (int r = 0; r < R; r++) {
                        int64_t to = r * width + j + h * W;
                        store(ds.data() + to, load(p.data() + to) * (t[r][h] - delta[r]));
                    }
            }
            Lanes dq[R][C];
            gather(ds.data(), width, k_rows.data(), from, i + 1, scratch.data(), dq);
            float back[R * K];
            for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) store(back + r * K + c * W, dq[r][c]);
            for (int r = 0; r < R; r++) rope(back + r * K, cos + (row * s + i) * K, sin + (row * s + i) * K, -1, SCALE);
            narrow_rows(back, R, d_qkv + (row * s + i) * STRIDE + g * R * K);
            scatter(p.data(), width, go_down.data(), from, i + 1, scratch.data(), dv_part.data());
            scatter(ds.data(), width, q_down.data(), from, i + 1, scratch.data(), dk_part.data());
            if ((i + 1) % SPAN == 0 || i + 1 == s)
                for (int64_t x = 0; x < (i + 1) * K; x += W) {
                    store(&dk[x], load(&dk[x]) + load(&dk_part[x])), store(&dk_part[x], Lanes{});
                    store(&dv[x], load(&dv[x]) + load(&dv_part[x])), store(&dv_part[x], Lanes{});
                }
        }
        for (int64_t i = 0; i < s; i++) {
            Number* to = d_qkv + (row * s + i) * STRIDE + Q_WIDTH + g * K;
            rope(&dk[i * K], cos + (row * s + i) * K, sin + (row * s + i) * K, -1, 1);
            narrow_rows(&dk[i * K], 1, to);
            narrow_rows(&dv[i * K], 1, to + G * K);
        }
    }
}

extern "C" void kernel(const Number* qkv, const float* cos, const float* sin, const int64_t* first, Number* out,
                       float* log_sum, const Number* d_out, Number* d_qkv, int64_t n, int64_t s, int64_t back) {
    if (back) backward(qkv, cos, sin, first, out, log_sum, d_out, d_qkv, n, s);
    else forward(qkv, cos, sin, first, out, log_sum, n, s);
}
"""
PRODUCTS_SOURCE = r"""
// Products of two matrices on a CPU, sums in fp32: C_MN = A_MK · B_KN, or C + A · B. Operands lie either way; bf16 is
// widened as it is packed, so that processors without bf16 instructions multiply it as fast as fp32.
//
// As in GotoBLAS (Goto and van de Geijn, ACM TOMS 34(3), 2008): DEPTH rows of B lie in strips of NR columns, packed by
// all threads together; each thread takes its share of C's rows, a block of them at a time, which stays in L2 while the
// strips go through L1, and MR x NR sums stay in registers. What a sum is made of, and in which order, depends on K alone:
// another number of threads gives the same bits.
//
// The engine's file defines Number before this text.
#pragma GCC optimize("fp-contract=fast")
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
constexpr int W = 16, MR = 12;  // numbers a vector; rows of C, whose sums take 24 of 32 registers, or 12 of 16
constexpr int64_t DEPTH = 192;  // a strip takes 24 KiB of L1, or 16
#else
constexpr int W = 8, MR = 6;
constexpr int64_t DEPTH = 256;
#endif
constexpr int NR = 2 * W;
constexpr int64_t BLOCK = 72, WIDTH = 4096;  // rows of A in L2, columns of B in L3
static_assert(BLOCK % MR == 0, "a thread's room holds whole panels");
// Single numbers: bf16 widened to fp32, and fp32 rounded to nearest even on the way back. Loops over them are vectors.
static inline float wide(float x) { return x; }
static inline float wide(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
static inline void narrow(float x, float* p) { *p = x; }
static inline void narrow(float x, uint16_t* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = x == x ? bits : 0x7fc0;
}

// exp of x <= 0, to about 1e-7: 2^n · e^r with |r| <= ln 2 / 2; e^-87, or 1.6e-38, for all below, and NaN for NaN. Of a
// number or of a vector of them, Int being as many whole numbers.
template <typename To, typename From> static inline To converted(From x) {
    if constexpr (std::is_arithmetic_v<From>) return To(x);
    else return __builtin_convertvector(x, To);
}
template <typename Int, typename Real> static inline Real exponential(Real x) {
    x = x < -87.0f ? Real{} - 87.0f : x;
    Real n = converted<Real>(converted<Int>(x * 1.44269504f - 0.5f));
    Real r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Real p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Int bits = (converted<Int>(n) + 127) << 23;
    Real power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}
// Vectors of W numbers, which is defined before this text: fp32 as they lie, and bf16 rounded to nearest even.
typedef float Lanes __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * W), aligned(2), may_alias));

static inline Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
static inline void store(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }
static inline void narrow(Lanes x, float* p) { store(p, x); }
static inline void narrow(Lanes x, uint16_t* p) {
    Whole bits = (Whole)x;
    Whole even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(x == x ? even : Whole{} + 0x7fc0, Halves);
}
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Order __attribute__((vector_size(32)));
typedef uint16_t EightHalves __attribute__((vector_size(16), aligned(2), may_alias));

static inline Eight eight(const float* p) { return *reinterpret_cast<const Eight*>(p); }
static inline Eight eight(const uint16_t* p) {
    return (Eight)(__builtin_convertvector(*reinterpret_cast<const EightHalves*>(p), Order) << 16);
}

// Memory that a thread keeps from call to call, in whole cache lines.
struct Room {
    float* at = nullptr;
    int64_t size = 0;
    ~Room() { std::free(at); }
    float* of(int64_t count) {
        if (count > size) {
            std::free(at);
            size = (count + 15) / 16 * 16;
            at = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
        }
        return at;
    }
};

// Eight rows of eight numbers, transposed.
static inline void turn(const Number* x, int64_t stride, float* out, int64_t out_stride) {
    Eight r[8], s[8];
    for (int i = 0; i < 8; i++) r[i] = eight(x + i * stride);
    for (int i = 0; i < 8; i += 2) {
        s[i] = __builtin_shuffle(r[i], r[i + 1], Order{0, 8, 1, 9, 4, 12, 5, 13});
        s[i + 1] = __builtin_shuffle(r[i], r[i + 1], Order{2, 10, 3, 11, 6, 14, 7, 15});
    }
    for (int i = 0; i < 8; i += 4)
        for (int h = 0; h < 2; h++) {
            r[i + 2 * h] = __builtin_shuffle(s[i + h], s[i + h + 2], Order{0, 1, 8, 9, 4, 5, 12, 13});
            r[i + 2 * h + 1] = __builtin_shuffle(s[i + h], s[i + h + 2], Order{2, 3, 10, 11, 6, 7, 14, 15});
        }
    for (int i = 0; i < 4; i++) {
        Eight low = __builtin_shuffle(r[i], r[i + 4], Order{0, 1, 2, 3, 8, 9, 10, 11});
        Eight high = __builtin_shuffle(r[i], r[i + 4], Order{4, 5, 6, 7, 12, 13, 14, 15});
        *reinterpret_cast<Eight*>(out + i * out_stride) = low;
        *reinterpret_cast<Eight*>(out + (i + 4) * out_stride) = high;
    }
}

// `count` vectors of `depth` numbers, `across` apart, whose numbers lie `along` apart -> [count / SIDE, depth, SIDE],
// zeros where the last has fewer than SIDE.
template <int SIDE>
static void pack(const Number* x, int64_t across, int64_t along, int64_t count, int64_t depth, float* out) {
    int64_t whole = count / SIDE * SIDE;
    if (across == 1) {
        for (int64_t k = 0; k < depth; k += 4)  // a few rows at a time, read to their ends: columns lie in other pages
            for (int64_t i = 0; i < whole; i += SIDE)
                for (int64_t l = k; l < std::min(depth, k + 4); l++)
                    for (int h = 0; h < SIDE; h++) out[i * depth + l * SIDE + h] = wide(x[l * along + i + h]);
    } else
        for (int64_t i = 0; i < whole; i += SIDE) {
            int64_t k = 0;
            if (SIDE % 8 == 0 && along == 1)
                for (; k + 8 <= depth; k += 8)
                    for (int h = 0; h < SIDE; h += 8)
                        turn(x + (i + h) * across + k, across, out + i * depth + k * SIDE + h, SIDE);
            for (; k < depth; k++)
                for (int h = 0; h < SIDE; h++) out[i * depth + k * SIDE + h] = wide(x[(i + h) * across + k * along]);
        }
    if (whole < count)
        for (int64_t k = 0; k < depth; k++)
            for (int h = 0; h < SIDE; h++)
                out[whole * depth + k * SIDE + h] = whole + h < count ? wide(x[(whole + h) * across + k * along]) : 0;
}

// Rows of C, at most MR, and columns, at most NR, from its element `at` on: sums += A · B, or sums = A · B; with `out`,
// there instead. A's rows are `row` apart, and `step` from one number to the next.
static inline __attribute__((always_inline)) void tile(
    int64_t depth, const float* __restrict a, int64_t row, int64_t step, const float* __restrict b, float* sums,
    Number* out, int64_t at, int64_t stride, int64_t rows, int64_t columns, bool add) {
    Lanes s[MR][2];
    sums += at;
    for (int64_t r = 0; r < rows; r++) {  // what is written arrives while the product is computed
        if (out) __builtin_prefetch(out + at + r * stride, 1), __builtin_prefetch(out + at + r * stride + columns - 1, 1);
        if (add || !out) __builtin_prefetch(sums + r * stride, 1), __builtin_prefetch(sums + r * stride + columns - 1, 1);
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) s[r][0] = s[r][1] = Lanes{};
    for (int64_t k = 0; k < depth; k++, a += step, b += NR) {
        Lanes b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) s[r][0] += a[r * row] * b0, s[r][1] += a[r * row] * b1;
    }
    if (rows == MR && columns == NR) {
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++)
            for (int h = 0; h < 2; h++) {
                int64_t to = r * stride + h * W;
                if (add) s[r][h] += load(sums + to);
                if (out) narrow(s[r][h], out + at + to);
                else store(sums + to, s[r][h]);
            }
        return;
    }
    float part[MR * NR];
    Number narrowed[MR * NR];
    for (int r = 0; r < MR; r++)
        for (int h = 0; h < 2; h++) store(part + r * NR + h * W, s[r][h]);
    if (add)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < columns; j++) part[r * NR + j] += sums[r * stride + j];
    for (int i = 0; i < MR * NR; i += W) narrow(load(part + i), narrowed + i);
    for (int64_t r = 0; r < rows; r++)
        if (out) std::copy_n(narrowed + r * NR, columns, out + at + r * stride);
        else std::copy_n(part + r * NR, columns, sums + r * stride);
}

static int64_t share(int64_t count, int64_t of, int64_t parts) { return count * of / parts; }

// sums: fp32 [M, N], contiguous as out. With `gradient` they are the result, added to unless `replace`; else out is, and
// they are where it is summed up: of fp32, out itself.
extern "C" void kernel(const Number* a, const Number* b, Number* out, float* sums, int64_t m, int64_t n, int64_t k,
                       int64_t a_row, int64_t a_step, int64_t b_step, int64_t b_column, int64_t gradient,
                       int64_t replace) {
    static thread_local Room strips;
    if (k == 0) {
        if (!gradient) std::fill_n(out, m * n, Number{});
        else if (replace) std::fill_n(sums, m * n, 0.0f);
        return;
    }
    const int64_t chunks = (k + DEPTH - 1) / DEPTH, most = ((k + chunks - 1) / chunks + 7) / 8 * 8;  // at most DEPTH
    const int64_t panels = (m + MR - 1) / MR;
    float* packed = strips.of(most * ((std::min(n, WIDTH) + NR - 1) / NR * NR));
    const bool direct = std::is_same_v<Number, float> && a_step == 1;  // rows of fp32 are read as they lie
    constexpr bool narrowing = !std::is_same_v<Number, float>;
#pragma omp parallel
    {
        static thread_local Room rows;
        float* own = rows.of(BLOCK * most);
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        int64_t across = threads;  // threads that share C's rows; the others share its columns
        while (across > 1 && (threads % across || panels / across < 8)) across--;
        const int64_t down = threads / across;
        const int64_t from = share(panels, me % across, across) * MR;
        const int64_t to = std::min(share(panels, me % across + 1, across) * MR, m);
        for (int64_t left = 0; left < n; left += WIDTH) {
            const int64_t width = std::min(WIDTH, n - left), count = (width + NR - 1) / NR;
            const int64_t first = share(count, me / across, down) * NR;
            const int64_t last = std::min(share(count, me / across + 1, down) * NR, width);
            for (int64_t top = 0; top < k; top += most) {
                const int64_t depth = std::min(most, k - top);
                const bool add = top || (gradient && !replace);
                Number* narrowed = narrowing && !gradient && top + depth == k ? out : nullptr;
#pragma omp barrier  // all have read what is packed anew
                const int64_t mine = share(count, me, threads) * NR;
                const int64_t others = std::min(share(count, me + 1, threads) * NR, width);
                pack<NR>(b + top * b_step + (left + mine) * b_column, b_column, b_step, others - mine, depth,
                         packed + mine * depth);
#pragma omp barrier
                for (int64_t i = from; i < to; i += BLOCK) {
                    const int64_t high = std::min(BLOCK, to - i), ready = direct ? high / MR * MR : 0;
                    const Number* block = a + i * a_row + top * a_step;
                    if (ready < high)
                        pack<MR>(block + ready * a_row, a_row, a_step, high - ready, depth, own + ready * depth);
                    for (int64_t j = first; j < last; j += NR) {
                        const int64_t columns = std::min<int64_t>(NR, last - j), at = i * n + left + j;
                        const float* strip = packed + j * depth;
                        for (int64_t r = 0; r < ready; r += MR)
                            tile(depth, reinterpret_cast<const float*>(block) + r * a_row, a_row, 1, strip, sums,
                                 narrowed, at + r * n, n, MR, columns, add);
                        for (int64_t r = ready; r < high; r += MR)
                            tile(depth, own + r * depth, 1, MR, strip, sums, narrowed, at + r * n, n,
                                 std::min<int64_t>(MR, high - r), columns, add);
                    }
                }
            }
        }
    }
}
"""
REGIONS_SOURCE = r"""
// The element-wise regions of the production schedule on a CPU: the formulas of ops/regions.py, where each is told. A row
// is read from memory once, and again from the caches. Arithmetic is fp32, rounded once at the end. Sums over rows are of
// spans of rows, then of those: another number of threads gives the same bits.
//
// The engine's file defines Number before this text. Matrices are contiguous.
#pragma GCC optimize("fp-contract=fast")
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
// Single numbers: bf16 widened to fp32, and fp32 rounded to nearest even on the way back. Loops over them are vectors.
static inline float wide(float x) { return x; }
static inline float wide(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
static inline void narrow(float x, float* p) { *p = x; }
static inline void narrow(float x, uint16_t* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *p = x == x ? bits : 0x7fc0;
}

// exp of x <= 0, to about 1e-7: 2^n · e^r with |r| <= ln 2 / 2; e^-87, or 1.6e-38, for all below, and NaN for NaN. Of a
// number or of a vector of them, Int being as many whole numbers.
template <typename To, typename From> static inline To converted(From x) {
    if constexpr (std::is_arithmetic_v<From>) return To(x);
    else return __builtin_convertvector(x, To);
}
template <typename Int, typename Real> static inline Real exponential(Real x) {
    x = x < -87.0f ? Real{} - 87.0f : x;
    Real n = converted<Real>(converted<Int>(x * 1.44269504f - 0.5f));
    Real r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Real p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Int bits = (converted<Int>(n) + 127) << 23;
    Real power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

constexpr int64_t FEW = 1 << 14;  // numbers for which other threads are not worth waking

static inline float sigmoid(float x) {
    float e = exponential<int32_t>(-std::fabs(x));
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

// What each of ``count`` rows of ``width`` numbers wants done.
template <typename Function> static inline void each(int64_t count, int64_t width, Function function) {
#pragma omp parallel for schedule(static) if (count * width > FEW)
    for (int64_t row = 0; row < count; row++) function(row);
}

extern "C" void norm(const Number* x, const Number* branch, const Number* weight, Number* total, Number* out,
                     float* inverse, int64_t rows, int64_t width, double eps, double scale) {
    each(rows, width, [=](int64_t row) {
        const Number* from = x + row * width;
        if (branch) {
            const Number* other = branch + row * width;
            Number* sum = total + row * width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) narrow(wide(from[i]) + wide(other[i]) * float(scale), sum + i);
            from = sum;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += wide(from[i]) * wide(from[i]);
        float root = 1.0f / std::sqrt(squares / width + float(eps));
        inverse[row] = root;
        Number* to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) narrow(wide(from[i]) * root * wide(weight[i]), to + i);
    });
}

// sums: room for [rows / span, rounded up, width]. d_residual may be null.
extern "C" void norm_backward(const Number* x, const float* inverse, const Number* weight, const Number* d_out,
                              const Number* d_residual, Number* d_x, float* d_weight, float* sums, int64_t rows,
                              int64_t width, int64_t span) {
    int64_t spans = (rows + span - 1) / span;
    each(spans, span * width, [=](int64_t which) {
        float* sum = sums + which * width;
        std::fill_n(sum, width, 0.0f);
        for (int64_t row = which * span; row < std::min(rows, (which + 1) * span); row++) {
            const Number *from = x + row * width, *d = d_out + row * width, *past = d_residual ? d_residual + row * width : d;
            Number* to = d_x + row * width;
            float root = inverse[row], mean = 0;
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < width; i++) mean += wide(d[i]) * wide(weight[i]) * (wide(from[i]) * root);
            mean /= width;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) {
                float normed = wide(from[i]) * root, passed = d_residual ? wide(past[i]) : 0.0f;
                sum[i] += wide(d[i]) * normed;
                narrow(passed + root * (wide(d[i]) * wide(weight[i]) - normed * mean), to + i);
            }
        }
    });
    std::fill_n(d_weight, width, 0.0f);
    for (int64_t which = 0; which < spans; which++)
#pragma omp simd
        for (int64_t i = 0; i < width; i++) d_weight[i] += sums[which * width + i];
}

extern "C" void swiglu(const Number* gate_up, Number* out, int64_t rows, int64_t width) {
    each(rows, width, [=](int64_t row) {
        const Number *gate = gate_up + 2 * row * width, *up = gate + width;
        Number* to = out + row * width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) narrow(wide(gate[i]) * sigmoid(wide(gate[i])) * wide(up[i]), to + i);
    });
}

extern "C" void swiglu_backward(const Number* gate_up, const Number* d_out, Number* d_gate_up, int64_t rows,
                                int64_t width) {
    each(rows, width, [=](int64_t row) {
        const Number *gate = gate_up + 2 * row * width, *up = gate + width, *d = d_out + row * width;
        Number *d_gate = d_gate_up + 2 * row * width, *d_up = d_gate + width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float g = wide(gate[i]), s = sigmoid(g), back = wide(d[i]);
            narrow(back * wide(up[i]) * s * (1.0f + g * (1.0f - s)), d_gate + i);
            narrow(back * g * s, d_up + i);
        }
    });
}

// Sums of this many exponentials each are added up, for the digits' sake.
constexpr int64_t PIECE = 1024;
static inline float exponentials(const Number* x, int64_t count, float top) {
    float total = 0;
    for (int64_t from = 0; from < count; from += PIECE) {
        int64_t to = std::min(count, from + PIECE);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = from; i < to; i++) sum += exponential<int32_t>(wide(x[i]) - top);
        total += sum;
    }
    return total;
}

// Whether a label is among these logits; it is -1 where it is in another part of the vocabulary.
static inline bool among(int64_t label, int64_t vocab) { return label >= 0 && label < vocab; }

// A row of logits becomes cross-entropy's gradient.
static inline void gradient(Number* x, int64_t vocab, int64_t label, float log_sum, float d_nll) {
    float own = among(label, vocab) ? exponential<int32_t>(wide(x[label]) - log_sum) - 1.0f : 0.0f;
#pragma omp simd
    for (int64_t i = 0; i < vocab; i++) narrow(exponential<int32_t>(wide(x[i]) - log_sum) * d_nll, x + i);
    if (among(label, vocab)) narrow(own * d_nll, x + label);
}

extern "C" void entropy(Number* logits, const int64_t* labels, const float* d_nll, float* nll, int64_t rows,
                        int64_t vocab) {
    each(rows, vocab, [=](int64_t row) {
        Number* x = logits + row * vocab;
        float top = wide(x[0]);
#pragma omp simd reduction(max : top)
        for (int64_t i = 0; i < vocab; i++) top = std::max(top, wide(x[i]));
        float log_sum = top + std::log(exponentials(x, vocab, top));
        nll[row] = log_sum - (among(labels[row], vocab) ? wide(x[labels[row]]) : 0.0f);
        gradient(x, vocab, labels[row], log_sum, d_nll[row]);
    });
}

extern "C" void vocabulary_sums(const Number* logits, const int64_t* labels, const float* top, float* sums,
                                int64_t rows, int64_t vocab) {
    each(rows, vocab, [=](int64_t row) {
        const Number* x = logits + row * vocab;
        sums[row] = exponentials(x, vocab, top[row]);
        sums[rows + row] = among(labels[row], vocab) ? wide(x[labels[row]]) - top[row] : 0.0f;
    });
}

extern "C" void vocabulary_gradient(Number* logits, const int64_t* labels, const float* log_sum, const float* d_nll,
                                    int64_t rows, int64_t vocab) {
    each(rows, vocab, [=](int64_t row) {
        gradient(logits + row * vocab, vocab, labels[row], log_sum[row], d_nll[row]);
    });
}

// rates: lr / (1 - beta1^t), sqrt(1 - beta2^t) and 1 - lr · decay. rounded may be null.
extern "C" void adamw(float* p, const float* g, float* m, float* v, Number* rounded, const float* factor,
                      const float* rates, int64_t count, double beta1, double beta2, double eps) {
    constexpr int64_t PART = 4096;
    float clip = *factor, step = rates[0], root = rates[1], kept = rates[2];
    float first = 1 - beta1, second = beta2, rest = 1 - beta2, small = eps;
    each((count + PART - 1) / PART, PART, [=](int64_t part) {
        int64_t to = std::min(count, (part + 1) * PART);
#pragma omp simd
        for (int64_t i = part * PART; i < to; i++) {
            float grad = g[i] * clip;
            m[i] += (grad - m[i]) * first;
            v[i] = v[i] * second + grad * grad * rest;
            p[i] = p[i] * kept - step * m[i] / (std::sqrt(v[i]) / root + small);
        }
        if (rounded)
#pragma omp simd
            for (int64_t i = part * PART; i < to; i++) narrow(p[i], rounded + i);
    });
}
"""


# ---------------------------------------------------------------------------------------------------------------------
# Weights: one flat buffer each for weights and gradients; matrices, which decay, lie before vectors.
# Each rank keeps the masters and moments of one part of it alone, whole rows of whole matrices but at its edges.


def stored_shapes() -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors that this engine keeps, in the order of the flat buffers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes[layer + "self_attn.qkv_proj.weight"] = (Q_WIDTH + 2 * KV_WIDTH, HIDDEN)
        shapes[layer + "self_attn.o_proj.weight"] = (HIDDEN, Q_WIDTH)
        shapes[layer + "mlp.gate_up_proj.weight"] = (2 * INTERMEDIATE, HIDDEN)
        shapes[layer + "mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (HIDDEN,)
        shapes[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    return shapes


def canonical_views(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors under canonical names, as views."""
    views = {}
    for name, tensor in stored.items():
        if ".qkv_proj." in name:
            for part, rows in zip("qkv", tensor.split([Q_WIDTH, KV_WIDTH, KV_WIDTH]), strict=True):
                views[name.replace(".qkv_proj.", f".{part}_proj.")] = rows
        elif ".gate_up_proj." in name:
            for part, rows in zip(("gate", "up"), tensor.split(INTERMEDIATE), strict=True):
                views[name.replace(".gate_up_proj.", f".{part}_proj.")] = rows
        else:
            views[name] = tensor
    return views


class Flat:
    """A flat buffer and its stored tensors as views."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        shapes = stored_shapes()
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), device=device, dtype=dtype)
        parts = self.flat.split(sizes)
        self.stored = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        self.decayed = sum(size for size, shape in zip(sizes, shapes.values(), strict=True) if len(shape) > 1)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name]


def buckets() -> dict[str, tuple[int, int]]:
    """What is sent at a time, in the order of the flat buffers: the embedding, each layer's matrices, the head, and all
    vectors → where it begins and ends."""
    found: dict[str, tuple[int, int]] = {}
    for name, tensor in Flat("meta", torch.float32).stored.items():
        bucket = "vectors" if tensor.dim() == 1 else ".".join(name.split(".")[: 3 if ".layers." in name else -1])
        start = tensor.storage_offset()
        found[bucket] = (found.get(bucket, (start, 0))[0], start + tensor.numel())
    return found


def part_bounds(ranks: int) -> list[int]:
    """Where each rank's part of the flat buffers begins, and the end: even parts, but no row is cut."""
    layout = Flat("meta", torch.float32)
    bounds = [rank * layout.flat.numel() // ranks for rank in range(ranks + 1)]
    for tensor in layout.stored.values():
        start, width = tensor.storage_offset(), tensor[0].numel()
        end = start + tensor.numel()
        bounds = [at - (at - start) % width if start <= at < end else at for at in bounds]
    return bounds


class Place(NamedTuple):
    """What a rank keeps of a parameter: where in its flat states, and where in the whole parameter."""

    start: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """It, as a view of a flat state."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.start)


def places(start: int, end: int) -> dict[str, Place]:
    """Canonical name → the rows of it that lie between ``start`` and ``end`` of the flat buffers, if any."""
    found = {}
    for name, view in canonical_views(Flat("meta", torch.float32).stored).items():
        offset, stride, rows = view.storage_offset(), view.stride(0), view.shape[0]
        first, last = (min(max(-((offset - at) // stride), 0), rows) for at in (start, end))  # rounded up
        if first < last:
            begin, other = offset + first * stride - start, tuple(view.shape[1:])
            kept = (begin, view.stride(), (last - first, *other))
            found[name] = Place(*kept, tuple(view.shape), (first,) + (0,) * len(other))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The engine.


class StepResult(NamedTuple):
    loss: Tensor
    grad_norm: Tensor
    applied: Tensor


class Shard(NamedTuple):
    tensor: Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]


class MicroBatch(NamedTuple):
    tokens: Tensor  # int64 [N, S]
    labels: Tensor  # int64 [T]
    mask: Tensor  # float32 [T]
    cos: Tensor  # float32 [N, S, K]
    sin: Tensor
    first: Tensor  # int64 [T], the first key of its row that a position sees


class Kept(NamedTuple):
    """What a layer's backward pass reads."""

    x: Tensor  # the layer's input, [T, D]
    normed1: Tensor
    inverse1: Tensor
    rows: Tensor  # [T, columns of Q, K and V]
    log_sum: Tensor  # fp32 [T, heads]
    context: Tensor  # [T, Q_WIDTH]
    middle: Tensor  # after attention's residual, [T, D]
    normed2: Tensor
    inverse2: Tensor
    gate_up: Tensor
    activated: Tensor


class Engine:
    def __init__(self, recipe: Mapping[str, Any], device: str, dtype: torch.dtype, group: Any) -> None:
        self.recipe, self.device, self.dtype, self.group = recipe, device, dtype, group
        self.attention = compiled_attention(ATTENTION_SOURCE, GROUPS, HEADS_PER_GROUP, HEAD_DIM, ATTENTION_SCALE, dtype)
        self.products = compiled_products(PRODUCTS_SOURCE, dtype)
        self.regions = compiled(REGIONS_SOURCE, dtype)
        self.weight, self.grad = Flat(device, dtype), Flat(device, torch.float32)
        self.bounds = part_bounds(1 if group is None else dist.get_world_size(group))
        rank = 0 if group is None else dist.get_rank(group)
        self.start, self.end = self.bounds[rank], self.bounds[rank + 1]
        own = self.weight.flat[self.start : self.end]
        self.master = own if dtype == torch.float32 else torch.zeros_like(own, dtype=torch.float32)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.places, self.buckets = places(self.start, self.end), buckets()
        self.sent: list[dist.Work] = []  # gradients on their way
        self.coming: dict[str, list[dist.Work]] = {}  # weights on their way, by bucket
        self.updates = 0
        # Whether the micro-batch is the step's first, whose gradients replace what was there; or its last, after whose
        # backward pass they are whole.
        self.first = self.last = True

    # Forward.

    def trunk(self, micro: MicroBatch) -> tuple[Tensor, Tensor, Tensor, list[Kept]]:
        """The last residual stream, its norm and the norm's inverse, and what the layers kept."""
        w, kept = self.weight, []
        self.arrive("model.embed_tokens", "vectors")
        x = w["model.embed_tokens.weight"].index_select(0, micro.tokens.reshape(-1))
        h, inverse = norm_native(self.regions, x, w["model.layers.0.input_layernorm.weight"], EPS)
        for i in range(LAYERS):
            self.arrive(f"model.layers.{i}")
            following = f"model.layers.{i + 1}.input_layernorm.weight" if i + 1 < LAYERS else "model.norm.weight"
            x, h, inverse, layer = self.layer(f"model.layers.{i}.", x, h, inverse, w[following], micro)
            kept.append(layer)
        return x, h, inverse, kept

    def layer(
        self, layer: str, x: Tensor, h: Tensor, inverse: Tensor, following: Tensor, micro: MicroBatch
    ) -> tuple[Tensor, Tensor, Tensor, Kept]:
        """From the normed input to the residual stream after the layer and the norm that follows it."""
        w, (n, s) = self.weight, micro.tokens.shape
        attn, mlp = layer + "self_attn.", layer + "mlp."
        qkv = product_native(self.products, h, w[attn + "qkv_proj.weight"])
        rows = qkv
        context, log_sum = attention_native_forward(
            self.attention, rows, micro.cos, micro.sin, micro.first, s, GROUPS * HEADS_PER_GROUP
        )
        branch = product_native(self.products, context, w[attn + "o_proj.weight"])
        middle, normed2, inverse2 = residual_norm_native(
            self.regions, x, branch, w[layer + "post_attention_layernorm.weight"], EPS, RESIDUAL_SCALE
        )
        gate_up = product_native(self.products, normed2, w[mlp + "gate_up_proj.weight"])
        activated = swiglu_native(self.regions, gate_up)
        branch = product_native(self.products, activated, w[mlp + "down_proj.weight"])
        after, normed, following_inverse = residual_norm_native(
            self.regions, middle, branch, following, EPS, RESIDUAL_SCALE
        )
        kept = Kept(x, h, inverse, rows, log_sum, context, middle, normed2, inverse2, gate_up, activated)
        return after, normed, following_inverse, kept

    def heads(self, qkv: Tensor, n: int, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """The columns [Q, K, V] of a product as heads: q [N, S, G, R, K], k and v [N, S, G, K]."""
        q, k, v = qkv.view(n, s, -1).split([Q_WIDTH, KV_WIDTH, KV_WIDTH], dim=-1)
        q = q.view(n, s, GROUPS, HEADS_PER_GROUP, HEAD_DIM)
        return q, k.view(n, s, GROUPS, HEAD_DIM), v.view(n, s, GROUPS, HEAD_DIM)

    def head(self, h: Tensor, micro: MicroBatch, denominator: Tensor, train: bool) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the loss and, when training, the gradient of h; logits exist in slices alone."""
        self.arrive("lm_head")
        weight = self.weight["lm_head.weight"]
        d_nll, d_h, nll = micro.mask / denominator, torch.empty_like(h), torch.empty_like(micro.mask)
        for start in range(0, h.shape[0], HEAD_ROWS):
            part = slice(start, start + HEAD_ROWS)
            logits = product_native(self.products, h[part], weight)
            nll[part] = entropy_native(
                self.regions, logits, micro.labels[part], d_nll[part]
            )  # logits: their gradient from here
            if train:
                d_h[part] = product_native(self.products, logits, weight.t())
                self.add_product("lm_head.weight", logits, h[part], replace=self.first and start == 0)
        return (nll * micro.mask).sum() / denominator, d_h

    # Backward: gradients go into the flat buffer as they come.

    def add_product(self, name: str, d_out: Tensor, x: Tensor, replace: bool | None = None) -> None:
        """grad ← d_outᵀ x, or grad ← grad + d_outᵀ x after the first micro-batch."""
        replace = self.first if replace is None else replace
        weight_gradient_native(self.products, self.grad[name], d_out, x, replace)

    def add(self, name: str, d_weight: Tensor) -> None:
        if self.first:
            self.grad[name].copy_(d_weight)
        else:
            self.grad[name].add_(d_weight)

    def micro_step(self, micro: MicroBatch, denominator: Tensor) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the loss."""
        w = self.weight
        x, h, inverse, kept = self.trunk(micro)
        loss, d_h = self.head(h, micro, denominator, train=True)
        self.send("lm_head")
        dx, d_weight = norm_backward_native(
            self.regions, x, inverse, w["model.norm.weight"], d_h, torch.zeros_like(d_h)
        )
        self.add("model.norm.weight", d_weight)
        for i in reversed(range(LAYERS)):
            dx = self.layer_backward(f"model.layers.{i}.", dx, kept.pop(), micro)
            self.send(f"model.layers.{i}")
        self.send("vectors")
        embedding = self.grad["model.embed_tokens.weight"]
        if self.first:
            embedding.zero_()
        embedding.index_add_(0, micro.tokens.reshape(-1), dx.float())
        self.send("model.embed_tokens")
        return loss

    def layer_backward(self, layer: str, dx: Tensor, kept: Kept, micro: MicroBatch) -> Tensor:
        w, (n, s) = self.weight, micro.tokens.shape
        attn, mlp = layer + "self_attn.", layer + "mlp."
        d_branch = dx
        self.add_product(mlp + "down_proj.weight", d_branch, kept.activated)
        d_gate_up = swiglu_backward_native(
            self.regions, kept.gate_up, product_native(self.products, d_branch, w[mlp + "down_proj.weight"].t())
        )
        self.add_product(mlp + "gate_up_proj.weight", d_gate_up, kept.normed2)
        d_normed = product_native(self.products, d_gate_up, w[mlp + "gate_up_proj.weight"].t())
        name = layer + "post_attention_layernorm.weight"
        dx, d_weight = norm_backward_native(self.regions, kept.middle, kept.inverse2, w[name], d_normed, dx)
        self.add(name, d_weight)
        d_branch = dx
        self.add_product(attn + "o_proj.weight", d_branch, kept.context)
        d_context = product_native(self.products, d_branch, w[attn + "o_proj.weight"].t())
        d_qkv = attention_native_backward(
            self.attention, kept.rows, micro.cos, micro.sin, micro.first, kept.context, kept.log_sum, d_context, s
        )
        self.add_product(attn + "qkv_proj.weight", d_qkv, kept.normed1)
        d_normed = product_native(self.products, d_qkv, w[attn + "qkv_proj.weight"].t())
        name = layer + "input_layernorm.weight"
        dx, d_weight = norm_backward_native(self.regions, kept.x, kept.inverse1, w[name], d_normed, dx)
        self.add(name, d_weight)
        return dx

    # Between ranks. What is begun here goes on beside the computation; every rank begins it in the same order.

    def send(self, bucket: str) -> None:
        """Begins to add a bucket's gradients over the ranks, when they are whole: each part comes to the rank that keeps its states."""
        if self.group is None or not self.last:
            return
        for rank, part in self.parts(bucket):
            work = dist.reduce(self.grad.flat[part], group_dst=rank, group=self.group, async_op=True)
            self.sent.append(work)

    def settle(self) -> None:
        """Waits until the gradients are added."""
        for work in self.sent:
            work.wait()
        self.sent.clear()

    def parts(self, bucket: str) -> Iterable[tuple[int, slice]]:
        """(rank, what of the bucket it keeps), ranks that keep none left out."""
        start, end = self.buckets[bucket]
        for rank in range(len(self.bounds) - 1):
            part = slice(max(start, self.bounds[rank]), min(end, self.bounds[rank + 1]))
            if part.start < part.stop:
                yield rank, part

    def publish(self) -> None:
        """Begins to send every rank's new weights to the others, in the order in which the forward pass reads them."""
        if self.group is None:
            return
        for bucket in sorted(self.buckets, key=lambda name: name != "vectors"):
            self.coming[bucket] = [
                dist.broadcast(self.weight.flat[part], group_src=rank, group=self.group, async_op=True)
                for rank, part in self.parts(bucket)
            ]

    def arrive(self, *buckets: str) -> None:
        """Waits until the new weights of these buckets, or of all, are here."""
        for bucket in buckets or self.buckets:
            for work in self.coming.pop(bucket, ()):
                work.wait()

    # One step: micro-batches, reduction, clipping, update.

    def micro_batches(self, batch: Any) -> Iterable[MicroBatch]:
        rows, (n, s) = self.recipe["micro_batch_size"], batch.tokens.shape
        position = torch.arange(s, device=self.device).expand(n, s)
        for start in range(0, n, rows):
            row = slice(start, start + rows)
            cos, sin = rope_tables_fp32_forward(position[row], HEAD_DIM, ROPE_THETA)
            visible = torch.zeros(rows * s, dtype=torch.int64)
            yield MicroBatch(
                batch.tokens[row], batch.labels[row].reshape(-1), batch.mask[row].reshape(-1), cos, sin, visible
            )

    @torch.no_grad()
    def step(self, batch: Any, lr: float) -> StepResult:
        loss, count = torch.zeros((), device=self.device), -(-batch.tokens.shape[0] // self.recipe["micro_batch_size"])
        for number, micro in enumerate(self.micro_batches(batch)):
            self.first, self.last = number == 0, number + 1 == count
            loss += self.micro_step(micro, batch.loss_denominator)
        self.settle()
        norm = norm_blocked(self.grad.flat[self.start : self.end])
        if self.group is not None:
            sums = torch.stack([loss.double(), norm.double() ** 2])
            dist.all_reduce(sums, group=self.group)
            loss, norm = sums[0].float(), sums[1].sqrt().float()
        applied = torch.isfinite(norm)
        if applied:
            self.update(torch.clamp(self.recipe["clip"] / (norm + 1e-6), max=1.0), lr)
        return StepResult(loss, norm, applied)

    def update(self, factor: Tensor, lr: float) -> None:
        r = self.recipe
        self.updates += 1
        step, root = lr / (1 - r["beta1"] ** self.updates), (1 - r["beta2"] ** self.updates) ** 0.5
        grad, weight = self.grad.flat[self.start : self.end], self.weight.flat[self.start : self.end]
        decayed = min(max(self.weight.decayed - self.start, 0), grad.numel())
        for part, decay in ((slice(0, decayed), r["weight_decay"]), (slice(decayed, None), 0.0)):
            if grad[part].numel():
                buffers = [flat[part] for flat in (self.master, grad, self.exp_avg, self.exp_avg_sq)]
                rounded = None if self.dtype == torch.float32 else weight[part]
                rates = torch.tensor([step, root, 1 - lr * decay], device=self.device)
                adamw_native(self.regions, *buffers, rounded, factor, rates, r["beta1"], r["beta2"], r["eps"])
        self.publish()

    @torch.no_grad()
    def loss(self, batch: Any) -> Tensor:
        """The mean loss of this rank's rows over their mask."""
        denominator = batch.mask.sum()
        shares = []
        for micro in self.micro_batches(batch):
            h = self.trunk(micro)[1]
            shares.append(self.head(h, micro, denominator, train=False)[0])
        return torch.stack(shares).sum()

    # Weights and state.

    def load(self, weights: Mapping[str, Tensor]) -> None:
        views = canonical_views(self.weight.stored)
        if set(weights) != set(views):
            raise ValueError(f"weights do not fit this engine: {sorted(set(weights) ^ set(views))[:3]}")
        self.arrive()
        for name, view in views.items():
            view.copy_(weights[name].to(self.dtype))
        self.master.copy_(self.weight.flat[self.start : self.end])
        self.exp_avg.zero_()
        self.exp_avg_sq.zero_()
        self.updates = 0

    def states(self) -> dict[str, Tensor]:
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def state(self) -> dict[str, Shard]:
        self.arrive()
        shards = {
            f"{kind}/{name}": Shard(place.of(flat), place.global_shape, place.offsets)
            for kind, flat in self.states().items()
            for name, place in self.places.items()
        }
        return {**shards, "step": Shard(torch.tensor(self.updates), (), ())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes whole tensors or pieces of them that hold at least what this rank keeps."""
        self.arrive()
        for kind, flat in self.states().items():
            for name, place in self.places.items():
                given, sizes = state[f"{kind}/{name}"], zip(place.offsets, place.shape, strict=True)
                box = tuple(slice(at - o, at - o + n) for (at, n), o in zip(sizes, given.offsets, strict=True))
                place.of(flat).copy_(given.tensor[box])
        self.updates = int(state["step"].tensor)
        self.weight.flat[self.start : self.end].copy_(self.master)
        self.publish()


def build(target: Mapping[str, Any], *, device: str, precision: str, mesh: Any = None) -> Engine:
    """The one factory; ``target`` is a target's plain values and must be of the model this file was written for."""
    for key, value in MODEL.items():
        if target["model"][key] != value:
            raise ValueError(f"this engine is for model.{key} = {value!r}, the target has {target['model'][key]!r}")
    if target["data"]["documents"] != DOCUMENTS:
        raise ValueError(f"this engine is for data.documents = {DOCUMENTS!r}, got {target['data']['documents']!r}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return Engine(target["recipe"], device, dtype, None if mesh is None else mesh.get_group())
