"""The C++ kernel of products against float64: operands that lie either way, sizes that no tile divides, both dtypes."""

import os

import pytest
import torch

from forgetrain.ops.native import (
    compiled,
    compiled_products,
    kernel_source,
    product_native,
    run_kernel,
    weight_gradient_native,
)

SOURCE = kernel_source("products")
#: Rows, columns and what is summed over: less than a tile, than a block, than one depth; and more than each of them.
SIZES = [(1, 1, 1), (5, 33, 9), (48, 64, 256), (150, 97, 300), (601, 40, 517), (30, 4200, 40)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def kernel(dtype):
    """Of bf16 as a processor without bf16 instructions has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return compiled_products(SOURCE, dtype)


def random(rows: int, columns: int, dtype: torch.dtype, lies: str) -> torch.Tensor:
    """[rows, columns] whose numbers lie by rows, by columns, or apart from each other in a larger matrix."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    if lies == "columns":
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    wide = torch.randn(rows, 2 * columns, generator=generator).to(dtype)
    return wide[:, ::2] if lies == "apart" else wide[:, :columns]


def on_threads(number: int, compute):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return compute()
    finally:
        torch.set_num_threads(before)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("threads", [1, 2, 3, 4])  # four share both the rows and the columns of the smaller ones
@pytest.mark.parametrize("lies", ["rows", "columns", "apart"])
@pytest.mark.parametrize("size", SIZES)
def test_products_are_those_of_float64(kernel, dtype, size, lies, threads):
    m, n, k = size
    a, b = random(m, k, dtype, lies), random(n, k, dtype, lies)
    found, alone = (on_threads(number, lambda: product_native(kernel, a, b)) for number in (threads, 1))
    assert found.dtype == dtype
    assert found.is_contiguous()
    exact = a.double() @ b.double().t()
    if dtype == torch.bfloat16:
        assert error(found, exact) < 3e-3
        near = exact.abs().maximum(exact.abs().mean())  # sums are fp32: one rounding at the end
        assert float(((found.double() - exact).abs() / near).max()) < 2**-8 + 1e-4
    else:
        assert error(found, exact) < 1e-6
    assert torch.equal(found, alone)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_of_weights_are_summed_in_fp32(kernel, dtype, size):
    m, n, k = size
    d_out, x = random(k, m, dtype, "rows"), random(k, n, dtype, "rows")
    exact = d_out.double().t() @ x.double()
    grad = torch.full((m, n), float("nan"))
    weight_gradient_native(kernel, grad, d_out, x, replace=True)
    assert error(grad, exact) < 1e-6
    weight_gradient_native(kernel, grad, d_out, x, replace=False)
    assert error(grad, 2 * exact) < 1e-6


def test_a_sum_of_nothing_is_zero(kernel, dtype):
    a, b = torch.empty(3, 0, dtype=dtype), torch.empty(5, 0, dtype=dtype)
    assert torch.equal(product_native(kernel, a, b), torch.zeros(3, 5, dtype=dtype))
    grad = torch.ones(3, 5)
    weight_gradient_native(kernel, grad, a.t(), b.t(), replace=False)
    assert torch.equal(grad, torch.ones(3, 5))
    weight_gradient_native(kernel, grad, a.t(), b.t(), replace=True)
    assert torch.equal(grad, torch.zeros(3, 5))


def test_what_the_kernel_would_misread_is_refused(kernel, dtype):
    a, b, other = torch.ones(3, 4, dtype=dtype), torch.ones(5, 4, dtype=dtype), torch.ones(5, 4, dtype=torch.float16)
    for wrong in (other, b[:, :3]):
        with pytest.raises(ValueError, match="no product of"):
            product_native(kernel, a, wrong)
    for grad in (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(8, 8)[::2, ::2]):
        with pytest.raises(ValueError, match="no gradient of"):
            weight_gradient_native(kernel, grad, a, a, replace=True)


def test_nan_and_infinity_come_through(kernel, dtype):
    a, b = random(7, 20, dtype, "rows"), random(40, 20, dtype, "rows")
    a[3, 4], a[5, 0] = float("nan"), float("inf")
    found = product_native(kernel, a, b)
    assert found[3].isnan().all()
    assert (found[5].isinf() | found[5].isnan()).all()
    assert found[[0, 1, 2, 4, 6]].isfinite().all()


def test_bf16_is_left_to_processors_that_multiply_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert compiled_products(SOURCE, torch.bfloat16) is None
    a, b, d_out = (random(6, 6, torch.bfloat16, "rows") for _ in range(3))
    assert torch.equal(product_native(None, a, b), torch.mm(a, b.t()))
    grad = torch.ones(6, 6)
    weight_gradient_native(None, grad, d_out, a, replace=False)
    assert torch.equal(grad, 1 + torch.mm(d_out.t(), a).float())


def test_a_kernel_is_built_once_and_for_each_text(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    text = 'extern "C" void kernel(float* x) { *x += %d; }'
    for _ in range(2):
        for added in (1, 2):
            number = torch.zeros(1)
            run_kernel(compiled(text % added, torch.float32).kernel, number)
            assert float(number) == added
    assert len(list(tmp_path.glob("*.so"))) == 2
    with pytest.raises(RuntimeError, match=r"does not build a kernel: .*error"):
        compiled("no C++", torch.float32)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".so", ".so"]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "another"])
def test_another_compiler_is_refused(monkeypatch, tmp_path, compiler):
    other = tmp_path / "another"
    other.write_text("#!/bin/sh\necho clang version 19\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(FileNotFoundError, match="built by GCC, which is not here: install g"):
        compiled(SOURCE, torch.float32)
