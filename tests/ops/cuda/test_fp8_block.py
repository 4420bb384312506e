"""Fp8 operands with units of blocks bit for bit against plain torch; on a CPU under Triton's interpreter, else on the
GPU."""

import math

import pytest
import torch

from forgetrain.ops.fp8 import rounded_to
from tests.ops.oracle import randn

pytest.importorskip("triton", reason="Triton is not installed: pip install forgetrain[gpu]")

from forgetrain.ops.cuda.fp8_block import empty_squares, quantise_spans, quantise_squares_
from tests.interpreter import round_to_nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
SHAPES = [(16, 144), (144, 16), (128, 256), (272, 400)]
round_to_nearest()


def numbers(*shape, seed=0):
    """Of all magnitudes: rows and columns differ by powers of two, some by more than a type spans; some are zero."""
    x = randn(*shape, seed=seed)
    for dim in (-2, -1):
        x = x * (randn(shape[dim], seed=dim + 9) * 4).round().exp2().unsqueeze(-1 if dim == -2 else 0)
    x[..., 3, :] = 0.0
    x[..., 5, 7] = 1e-30
    return x.to(DEVICE, torch.bfloat16)


def spread(unit, shape):
    """Units [R / high, C / wide] over [R, C]."""
    high, wide = (128 if n < m else 1 for n, m in zip(unit.shape, shape, strict=True))
    return unit.repeat_interleave(high, 0)[: shape[0]].repeat_interleave(wide, 1)[:, : shape[1]]


def same(numbers, unit, wanted):
    assert numbers.shape == wanted.shape
    assert numbers.is_contiguous()
    assert torch.equal(unit, unit.log2().round().exp2())  # a power of two
    return torch.equal(numbers.float() * unit, wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_spans_are_rounded_along_rows_as_they_lie_and_along_columns_turned(shape):
    x = numbers(*shape)
    found = quantise_spans(x)
    for numbers_, unit, y in ((found.rows, found.unit, x), (found.turned, found.turned_unit, x.t())):
        assert unit.shape == (
            math.ceil(y.shape[1] / 128),
            y.shape[0],
        )  # as cuBLASLt wants them: rows next to each other
        assert unit.is_contiguous()
        assert same(numbers_, spread(unit.t(), y.shape), rounded_to(E4M3, y, (1, 128)))


@pytest.mark.parametrize("shape", SHAPES)
def test_squares_are_rounded_alike_both_ways(shape):
    rows, cols = shape
    room = torch.zeros(3 * (rows * cols + 33), dtype=torch.bfloat16, device=DEVICE)
    x = room.as_strided((3, rows, cols), (rows * cols + 33, cols, 1)).copy_(numbers(3, rows, cols))
    found = quantise_squares_(x, empty_squares(x.shape, DEVICE))
    for i in range(3):
        part = found.part(i)
        high, wide = math.ceil(rows / 128), math.ceil(cols / 128)
        for unit, n, m in ((part.unit, high, wide), (part.turned_unit, wide, high)):
            assert unit.shape == (n, math.ceil(m / 4) * 4)
            assert not unit[:, m:].any()
        wanted = rounded_to(E4M3, x[i], (128, 128))
        assert same(part.rows, spread(part.unit[:, :wide], shape), wanted)
        assert same(part.turned, spread(part.turned_unit[:, :high], (cols, rows)), wanted.t())


@pytest.mark.parametrize("top", [448.0, 449.0, 1.75 * 2.0**-8, 0.875, 0.8789])
def test_the_largest_magnitude_of_a_block_is_in_the_upper_half_of_the_range(top):
    x = torch.zeros(32, 256, dtype=torch.bfloat16, device=DEVICE)
    x[3, 5], x[3, 200] = -top, 2.0**-60
    found = quantise_spans(x)
    largest = found.rows.float().view(32, 2, 128).abs().amax(2)
    assert 224.0 <= float(largest[3, 0]) <= 448.0
    assert 224.0 <= float(largest[3, 1]) <= 448.0
    assert int((largest > 0).sum()) == 2
    assert float(found.rows[3, 5].float() * found.unit[0, 3]) == pytest.approx(-top, rel=2**-4)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_nan_of_the_unit_of_its_block_alone(bad):
    x = numbers(144, 160)
    x[130, 9] = bad
    spans, squares = quantise_spans(x), quantise_squares_(x[None], empty_squares((1, *x.shape), DEVICE)).part(0)
    for unit, at in ((spans.unit, (0, 130)), (spans.turned_unit, (1, 9)), (squares.unit, (1, 0))):
        assert unit[at].isnan()
        assert int(unit.isnan().sum()) == 1
    assert squares.turned_unit[0, 1].isnan()
