"""Products of fp8 operands against float64; operands are made under Triton's interpreter on a CPU, else on the GPU."""

import math

import pytest
import torch

from forgetrain.ops.fp8 import rounded_to
from tests.ops.oracle import randn, relative

pytest.importorskip("triton", reason="Triton is not installed: pip install forgetrain[gpu]")

from forgetrain.ops.cuda import fp8, fp8_block, fp8_tensor
from forgetrain.ops.cuda.largest import SLOTS
from tests.interpreter import round_to_nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: Tokens, inputs and outputs: a block and less; whole blocks; blocks that the edges cut.
SIZES = [(48, 32, 64), (256, 128, 384), (160, 144, 272)]
SCALINGS = ["tensor", "block"]
round_to_nearest()


def numbers(*shape, seed=0, scale=1.0):
    return (randn(*shape, seed=seed) * scale).to(DEVICE, torch.bfloat16)


def tensors(tokens, inputs, outputs):
    """An input whose columns differ, a weight, and a gradient whose rows do."""
    x, weight = numbers(tokens, inputs), numbers(outputs, inputs, seed=1, scale=0.05)
    d_y = numbers(tokens, outputs, seed=2, scale=1e-5)
    return x * torch.linspace(0.1, 9.0, inputs, device=DEVICE).bfloat16(), weight, d_y * d_y[:, :1].sign().exp2()


def operands(scaling, x, weight, d_y):
    if scaling == "block":
        squares = fp8_block.quantise_squares_(weight[None], fp8_block.empty_squares((1, *weight.shape), DEVICE))
        return fp8_block.quantise_spans(x), squares.part(0), fp8_block.quantise_spans(d_y)
    largest = (torch.zeros(SLOTS, dtype=torch.int32, device=DEVICE) for _ in range(3))
    return tuple(
        fp8_tensor.quantise(y, fp8_tensor.find_largest_(y, next(largest)), gradient=y is d_y) for y in (x, weight, d_y)
    )


def rounded(scaling, x, weight, d_y):
    """In float64: x and d_y as rows give them, the weight, and x and d_y as columns do."""
    if scaling == "tensor":
        found = rounded_to(E4M3, x), rounded_to(E4M3, weight), rounded_to(E5M2, d_y)
        found = (found[0], found[2], found[1], found[0], found[2])
    else:
        rows, columns = ([rounded_to(E4M3, y, block) for y in (x, d_y)] for block in ((1, 128), (128, 1)))
        found = (*rows, rounded_to(E4M3, weight, (128, 128)), *columns)
    return [y.double() for y in found]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_products_are_those_of_the_rounded_operands(scaling, sizes):
    """What the rounding to fp8 leaves is multiplied: in bf16's error of the exact product of those numbers."""
    x, weight, d_y = tensors(*sizes)
    x8, w8, d8 = operands(scaling, x, weight, d_y)
    rx, rd, rw, cx, cd = rounded(scaling, x, weight, d_y)
    assert relative(fp8.fp8_forward(x8, w8, 0).cpu(), (rx @ rw.t()).cpu()) < 2**-8
    assert relative(fp8.fp8_input_grad(d8, w8, 0, 0.5).cpu(), (0.5 * rd @ rw).cpu()) < 2**-8
    grad = torch.full(weight.shape, 1e-3, device=DEVICE)
    fp8.fp8_weight_grad_(grad, d8.for_backward(), x8.for_backward(), 0, 0.5)
    # a tensor core's own sum of fp8 products has some fourteen bits
    assert relative(grad.cpu(), (1e-3 + 0.5 * cd.t() @ cx).cpu()) < (1e-5 if DEVICE == "cpu" else 1e-3)
    assert 0.01 < relative(rx.cpu(), x.double().cpu()) < 0.05  # and fp8 it is


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_not_finite_makes_nan_of_all_that_reads_its_unit(scaling, bad):
    x, weight, d_y = tensors(16, 32, 48)
    x[7, 9] = bad
    x8, w8, d8 = operands(scaling, x, weight, d_y)
    assert fp8.fp8_forward(x8, w8, rank=0)[7 if scaling == "block" else slice(None)].isnan().all()
    grad = torch.zeros(48, 32, device=DEVICE)
    fp8.fp8_weight_grad_(grad, d8, x8, 0)
    assert grad[:, 9 if scaling == "block" else slice(None)].isnan().all()


def test_in_fp32_a_product_is_that_of_linear():
    x, weight, d_y = (y.float() for y in (numbers(5, 8), numbers(6, 8, seed=1), numbers(5, 6, seed=2)))
    assert relative(fp8.fp8_forward(x, weight, 0).cpu(), (x @ weight.t()).cpu()) < 1e-6
    assert relative(fp8.fp8_input_grad(d_y, weight, 0).cpu(), (d_y @ weight).cpu()) < 1e-6
    grad = torch.zeros(6, 8, device=DEVICE)
    fp8.fp8_weight_grad_(grad, d_y, x, 0)
    assert relative(grad.cpu(), (d_y.t() @ x).cpu()) < 1e-6
