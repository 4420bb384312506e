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
    arguments, name = given(name_of(native), dtype), name_of(native)
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in exact]
    due = in_float64(f"{name}_region", *exact)
    found = native(kernels, *arguments)
    due, found = ([] if each is None else list(each if isinstance(each, tuple) else [each]) for each in (due, found))
    if name == "residual_norm":  # it norms the sum as it was rounded
        due[1:] = in_float64("norm_region", found[0].double(), exact[2], EPS)
    for value, now, old in zip(arguments, exact, before, strict=True):
        if isinstance(value, torch.Tensor):
            if torch.equal(now, old):
                assert torch.equal(value.to(old.dtype), old)
            else:
                due.append(now)
                found.append(value)
    assert due
    for value, right in zip(found, due, strict=True):
        assert value.shape == right.shape
        near = right.abs().maximum(right.abs().mean())
        once = value.dtype == torch.bfloat16  # rounded from fp32 sums
        assert error(value, right) < (2.2e-3 if once else 5e-7)
        assert float(((value.double() - right).abs() / near).max()) < (2**-8 + 1e-4 if once else 5e-6)


def in_float64(formula: str, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return getattr(regions, formula)(*arguments)


def test_labels_that_are_none_of_the_vocabulary_touch_nothing(kernels, dtype):
    labels = torch.tensor([-100, WIDTH, 5])
    memory = torch.full((5, WIDTH), float("nan"), dtype=dtype)  # what lies around the logits
    memory[1:4] = numbers(3, WIDTH, dtype=dtype)
    logits, exact = memory[1:4], memory[1:4].double()
    nll = native_regions.entropy_native(kernels, logits, labels, torch.ones(3))
    assert error(nll, in_float64("entropy_region", exact, labels, torch.ones(3).double())) < 1e-6
    assert error(logits, exact) < (2.2e-3 if dtype == torch.bfloat16 else 1e-6)
    assert bool(memory[[0, 4]].isnan().all())


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
