"""The C++ kernel of products against float64: operands that lie either way, sizes that no tile divides, both dtypes."""

import importlib.resources
import os
import tempfile

import pytest
import torch

from forgetrain.ops.native import (
    compiled,
    compiled_products,
    kernel_folder,
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
    with pytest.raises(ValueError, match=r"no gradient \(4, 3\) of"):
        weight_gradient_native(kernel, torch.zeros(4, 3), a, a, replace=True)
    for grad in (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(8, 8)[::2, ::2]):
        with pytest.raises(ValueError, match="cannot take"):
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


ADDING = 'extern "C" void kernel(float* x) { *x += %d; }'


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where kernels are kept: none yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return kernel_folder()


def added(number: int) -> float:
    """What a kernel adds to zero, by its text ``number``."""
    found = torch.zeros(1)
    run_kernel(compiled(ADDING % number, torch.float32).kernel, found)
    return float(found)


def test_a_kernel_is_built_once_and_for_each_text(folder):
    assert [added(1), added(2)] == [1, 2]
    first = {path: path.stat().st_ino for path in folder.iterdir()}
    assert [added(1), added(2)] == [1, 2]
    assert {path: path.stat().st_ino for path in folder.iterdir()} == first
    with pytest.raises(OSError, match=r"(?s)\A[^\n]*does not build a kernel:\n.*error"):
        compiled("no C++", torch.float32)
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so", ".so"]


def test_a_build_that_was_killed_is_made_again(folder):
    (folder / "made.so").write_bytes(b"half of a library")
    assert added(3) == 3


def test_kept_kernels_are_found_where_nothing_can_be_written(folder, monkeypatch):
    added(4)

    def refused(*_):
        raise AssertionError("it waits for the lock of a builder")

    monkeypatch.setattr("forgetrain.ops.native.fcntl.flock", refused)
    assert added(4) == 4


@pytest.mark.parametrize("given", ["", ".", "kept"])
def test_a_folder_may_be_named_in_any_way(monkeypatch, tmp_path, given):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    assert added(5) == 5


@pytest.mark.parametrize("how", ["a link", "others may write"])
def test_a_folder_that_others_can_fill_is_refused(monkeypatch, tmp_path, how):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    place = tmp_path / f"forgetrain-kernels-{os.getuid()}"
    if how == "a link":
        place.symlink_to(theirs)
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(PermissionError, match="is not this user's alone: remove it, or set TORCHINDUCTOR_CACHE_DIR"):
        added(6)
    assert not list(theirs.iterdir())


@pytest.mark.parametrize("path", ["none", "another"])
def test_another_compiler_is_refused(monkeypatch, tmp_path, path):
    other = tmp_path / "another" / "g++"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho clang version 19\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / path))
    with pytest.raises(FileNotFoundError, match=r"built by GCC's g\+\+, which is not here: apt install g"):
        compiled(SOURCE, torch.float32)


def test_numbers_are_rounded_as_torch_rounds_them(folder):
    numbers = importlib.resources.files("forgetrain.ops.cpu").joinpath("numbers.h").read_text("utf-8")
    head = "#include <cstring>\n#include <type_traits>\n"
    loop = "{ for (int64_t i = 0; i < n; i++) { narrow(x[i], out + i); back[i] = wide(out[i]); } }"
    text = f'{head}{numbers}extern "C" void kernel(const float* x, Number* out, float* back, int64_t n) {loop}'
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(1 << 16) << 16 | 0x8000  # halfway, of every number of bf16
    ties -= (ties >= 1 << 31).long() << 32
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, float("inf"), -float("inf"), float("nan")])
    x = torch.cat([torch.cat([bits, ties]).int().view(torch.float32), special])
    found, back = x.bfloat16() * 0, x * 0
    run_kernel(compiled(text, torch.bfloat16).kernel, x, found, back, x.numel())
    due, nan = x.bfloat16(), x.isnan()
    assert torch.equal(found.view(torch.int16)[~nan], due.view(torch.int16)[~nan])
    assert bool(found[nan].isnan().all())
    assert torch.equal(back[~nan], due.float()[~nan])
