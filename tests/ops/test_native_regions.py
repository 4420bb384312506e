"""The C++ kernels of regions against the formulas that they stand for, at widths that no vector divides, and rows that
no span does."""

import inspect

import pytest
import torch

from forgetrain.ops import native_regions, regions
from forgetrain.ops.native import compiled, kernel_source
from tests.ops.test_native import error, on_threads

ROWS, WIDTH = 70, 101
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(0, WIDTH, (ROWS,), generator=GENERATOR)
ABSENT = torch.where(torch.arange(ROWS) % 3 == 0, -1, LABELS)  # some are in another part of the vocabulary
EPS, SCALE = 1e-5, 0.3


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def kernels(dtype):
    return compiled(kernel_source("regions"), dtype)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=GENERATOR)).to(dtype)


def given(name: str, dtype: torch.dtype) -> tuple:
    """Arguments of a region."""
    x, other, third = (numbers(ROWS, WIDTH, dtype=dtype, scale=2) for _ in range(3))
    weight, positive = numbers(WIDTH, dtype=dtype), numbers(ROWS, 1).abs() + 0.5
    heads, back = (numbers(5, 7, 2, 3, WIDTH, dtype=dtype).transpose(1, 2) for _ in range(2))
    gate_up = numbers(ROWS, 2 * WIDTH, dtype=dtype, scale=20)
    p, g, m = (numbers(9001) for _ in range(3))
    v, rounded = numbers(9001).abs(), None if dtype == torch.float32 else numbers(9001, dtype=dtype)
    return {
        "norm": (x, weight, EPS),
        "residual_norm": (x, other, weight, EPS, SCALE),
        "norm_backward": (x, positive, weight, other, third),
        "swiglu": (gate_up,),
        "swiglu_backward": (gate_up, x),
        "head_norm": (heads, weight, EPS),
        "head_norm_backward": (heads, numbers(5, 2, 7, 3, 1).abs(), weight, back),
        "entropy": (4 * x, LABELS, numbers(ROWS)),
        "vocabulary_sums": (x, ABSENT, x.amax(-1).float()),
        "vocabulary_gradient": (x, ABSENT, x.float().logsumexp(-1), numbers(ROWS)),
        "adamw": (p, g, m, v, rounded, torch.tensor(0.7), torch.tensor([1e-2, 0.9, 0.99]), 0.9, 0.95, 1e-8),
    }[name]


def name_of(function) -> str:
    return function.__name__.removesuffix("_native")


NATIVE = [f for f in vars(native_regions).values() if inspect.isfunction(f) and f.__name__.endswith("_native")]


@pytest.mark.parametrize("native", NATIVE, ids=name_of)
def test_a_kernel_computes_what_its_formula_says(kernels, dtype, native):
    arguments = given(name_of(native), dtype)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the formulas, in float64
        due = getattr(regions, f"{name_of(native)}_region")(*wide)
    before = [tensor.clone() for tensor in tensors]
    found = native(kernels, *arguments)
    written = [tensor for tensor, old in zip(tensors, before, strict=True) if not torch.equal(tensor, old)]
    expected = [new for new, old in zip(wide, arguments, strict=True) if any(old is tensor for tensor in written)]
    pairs = list(zip(written, expected, strict=True))
    if due is not None:
        several = isinstance(due, tuple)
        pairs += zip(found if several else (found,), due if several else (due,), strict=True)
    assert pairs
    for value, exact in pairs:
        assert value.shape == exact.shape
        limit = 2e-6 if dtype == torch.float32 else 2**-8
        assert error(value, exact) < limit
        near = exact.abs().maximum(exact.abs().mean())
        assert float(((value.double() - exact).abs() / near).max()) < 30 * limit


def test_every_region_of_rows_has_a_kernel():
    names = {name for name in vars(regions) if name.endswith("_region")}
    rest = {"rope_region", "rope_backward_region", "transposed_region"}  # whose work is to move numbers
    assert names - rest == {f"{name_of(native)}_region" for native in NATIVE}


def test_bits_do_not_depend_on_the_number_of_threads(kernels, dtype):
    arguments = given("norm_backward", dtype)
    arguments = tuple(a.repeat(20, 1) if a.shape[0] == ROWS else a for a in arguments)
    first, *others = (
        on_threads(threads, lambda: native_regions.norm_backward_native(kernels, *arguments)) for threads in (1, 2, 3)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))


def test_what_is_not_a_number_is_told(kernels, dtype):
    logits = numbers(3, WIDTH, dtype=dtype)
    logits[1, 7] = float("nan")
    nll = native_regions.entropy_native(kernels, logits, LABELS[:3], torch.ones(3))
    assert nll.isnan().tolist() == [False, True, False]
    assert bool(logits[1].isnan().all())
    gate_up = torch.full((1, 2 * WIDTH), float("nan"), dtype=dtype)
    assert bool(native_regions.swiglu_native(kernels, gate_up).isnan().all())


def test_what_lies_otherwise_is_refused(kernels, dtype):
    x, weight = numbers(WIDTH, ROWS, dtype=dtype).t(), numbers(WIDTH, dtype=dtype)
    with pytest.raises(ValueError, match="contiguous"):
        native_regions.norm_native(kernels, x, weight, EPS)
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    with pytest.raises(ValueError, match="cannot take"):
        native_regions.norm_native(kernels, x.contiguous(), weight.to(other), EPS)
