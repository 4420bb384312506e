"""Linear with fp8 operands: the rounding against its formula in float64, products against those of rounded numbers."""

import pytest
import torch

from forgetrain.ops.fp8 import (
    linear_fp8_backward,
    linear_fp8_block_backward,
    linear_fp8_block_forward,
    linear_fp8_forward,
    rounded_to,
)
from forgetrain.ops.linear import linear_textbook_backward, linear_textbook_forward
from tests.ops.oracle import randn, relative

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.mark.parametrize(("dtype", "bits", "smallest"), [(E4M3, 4, 2.0**-9), (E5M2, 3, 2.0**-16)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0])
def test_numbers_are_the_nearest_of_their_type_under_a_power_of_two(dtype, bits, smallest, scale):
    x = (randn(64, 48, seed=1) * scale).bfloat16()
    most, top = float(x.double().abs().max()), torch.finfo(dtype).max
    unit = next(2.0**p for p in range(-60, 60) if most <= top * 2.0**p)
    exact = x.double() / unit
    step = torch.exp2(torch.floor(torch.log2(exact.abs())) - (bits - 1)).clamp(min=smallest)
    assert torch.equal(rounded_to(dtype, x).double(), torch.round(exact / step) * step * unit)


def test_zeros_stay_and_what_is_not_finite_makes_all_nan():
    x = torch.zeros(4, 4)
    assert torch.equal(rounded_to(E4M3, x), x)
    for bad in (torch.inf, -torch.inf, torch.nan):
        x[1, 2] = bad
        assert rounded_to(E5M2, x).isnan().all()


def test_products_are_those_of_the_rounded_operands():
    x, weight, d_out, bias = (randn(*s, seed=i).bfloat16() for i, s in enumerate([(20, 12), (7, 12), (20, 7), (7,)]))
    rx, rw, rd = (rounded_to(t, y).double() for t, y in ((E4M3, x), (E4M3, weight), (E5M2, d_out)))
    out, saved = linear_fp8_forward(x, weight, bias)
    d_x, d_weight, d_bias = linear_fp8_backward(saved, d_out)
    assert out.dtype == d_x.dtype == d_weight.dtype == torch.bfloat16
    found_and_due = (
        (out, rx @ rw.t() + bias.double()),
        (d_x, rd @ rw),
        (d_weight, rd.t() @ rx),
        (d_bias, d_out.sum(0)),
    )
    assert max(relative(found, due) for found, due in found_and_due) < 2**-7
    assert 0.01 < relative(rx, x.double()) < 0.05  # and fp8 it is


@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128)])
def test_a_block_is_rounded_as_if_it_were_alone(block):
    x = (randn(200, 300, seed=1) * (randn(200, 1, seed=2) * randn(1, 300, seed=3) * 12).exp2()).bfloat16()
    found = rounded_to(E4M3, x, block)
    assert found.shape == x.shape
    for column in zip(*(parts.split(block[1], 1) for parts in (found, x)), strict=True):
        for mine, alone in zip(*(parts.split(block[0]) for parts in column), strict=True):
            assert torch.equal(mine, rounded_to(E4M3, alone))


def test_what_is_not_finite_makes_nan_of_its_block_alone():
    x = randn(4, 300, seed=1)
    x[2, 200] = torch.inf
    found = rounded_to(E4M3, x, (1, 128)).isnan()
    assert found[2, 128:256].all()
    assert int(found.sum()) == 128


def test_products_by_blocks_are_of_operands_rounded_along_what_they_contract():
    x, weight, d_out, bias = (
        randn(*s, seed=i).bfloat16() for i, s in enumerate([(150, 140), (270, 140), (150, 270), (270,)])
    )
    x[:, ::2] *= 2.0**-18
    (rx, cx), (rd, cd) = ([rounded_to(E4M3, y, b).double() for b in ((1, 128), (128, 1))] for y in (x, d_out))
    rw = rounded_to(E4M3, weight, (128, 128)).double()
    out, saved = linear_fp8_block_forward(x, weight, bias)
    d_x, d_weight, d_bias = linear_fp8_block_backward(saved, d_out)
    assert out.dtype == d_x.dtype == d_weight.dtype == torch.bfloat16
    found_and_due = (
        (out, rx @ rw.t() + bias.double()),
        (d_x, rd @ rw),
        (d_weight, cd.t() @ cx),
        (d_bias, d_out.sum(0)),
    )
    assert max(relative(found, due) for found, due in found_and_due) < 2**-7
    assert not torch.equal(rx, cx)  # small numbers next to large ones, and alone below each other
    assert 0.01 < relative(rx, x.double()) < 0.05


@pytest.mark.parametrize(
    ("forward", "backward"),
    [(linear_fp8_forward, linear_fp8_backward), (linear_fp8_block_forward, linear_fp8_block_backward)],
)
def test_in_fp32_it_is_the_textbook_s(forward, backward):
    x, weight, d_out = randn(5, 4, seed=0).float(), randn(3, 4, seed=1).float(), randn(5, 3, seed=2).float()
    (mine, saved), (due, theirs) = forward(x, weight, None), linear_textbook_forward(x, weight, None)
    assert torch.equal(mine, due)
    gradients = backward(saved, d_out), linear_textbook_backward(theirs, d_out)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
