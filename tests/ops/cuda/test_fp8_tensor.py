"""Fp8 operands of one unit bit for bit against their formula in torch; on a CPU under Triton's interpreter, else on the
GPU."""

import math

import pytest
import torch

from tests.ops.oracle import randn

pytest.importorskip("triton", reason="Triton is not installed: pip install forgetrain[gpu]")

from forgetrain.ops.cuda import fp8, fp8_tensor, rmsnorm, swiglu
from forgetrain.ops.cuda.largest import SLOTS
from tests.interpreter import round_to_nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
round_to_nearest()


def numbers(*shape, seed=0, scale=1.0):
    return (randn(*shape, seed=seed) * scale).to(DEVICE, torch.bfloat16)


def slots(*stack):
    return torch.zeros(*stack, SLOTS, dtype=torch.int32, device=DEVICE)


def magnitude(largest):
    return float(largest.max().view(torch.float32))


def expected(x, gradient):
    """Numbers and unit: by logarithms, of which none is near a whole number but those that are one."""
    top, dtype = (57344.0, torch.float8_e5m2) if gradient else (448.0, torch.float8_e4m3fn)
    most = float(x.abs().max())
    power = math.floor(math.log2(top / most)) if most else 126
    return (x.double() * 2.0**power).float().to(dtype), 2.0**-power


def same(found, wanted):
    return torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("rows", "cols", "scale"), [(16, 144, 1.0), (144, 16, 3e-7), (32, 32, 1e4)])
def test_an_operand_is_its_formula_as_it_lies_and_turned(rows, cols, scale, gradient):
    x = numbers(rows, cols, scale=scale)
    x[0, :3] = torch.tensor([0.0, -1e-20, 2e-3 * scale])  # subnormal or nothing, once scaled
    largest = fp8_tensor.find_largest_(x, slots())
    assert magnitude(largest) == float(x.abs().max())
    found = fp8_tensor.quantise(x, largest, gradient)
    wanted, unit = expected(x, gradient)
    assert same(found.rows, wanted)
    assert same(found.turned, wanted.t().contiguous())
    assert float(found.unit) == unit


@pytest.mark.parametrize("top", [448.0, 449.0, 1.75 * 2.0**-8, 0.875, 0.8789, 0.0])
def test_the_largest_magnitude_is_in_the_upper_half_of_the_range(top):
    x = torch.zeros(16, 16, dtype=torch.bfloat16, device=DEVICE)
    x[3, 5] = -top
    found = fp8_tensor.quantise(x, fp8_tensor.find_largest_(x, slots()))
    held = found.rows.float()
    assert float(held[3, 5] * found.unit) == pytest.approx(-top, rel=2**-4)
    assert top == 0.0 or 224.0 <= float(held.abs().max()) <= 448.0


def test_a_stack_of_matrices_has_a_unit_each():
    flat = numbers(3 * 700)
    x = flat.as_strided((3, 16, 32), (700, 32, 1))
    x[1] *= 64
    found = fp8_tensor.quantise_(
        x, fp8_tensor.find_largest_(x, slots(3)), fp8_tensor.empty_fp8(x.shape, fp8.E4M3, DEVICE)
    )
    for i in range(3):
        alone = fp8_tensor.quantise(x[i], fp8_tensor.find_largest_(x[i], slots()))
        assert same(found.rows[i], alone.rows)
        assert same(found.turned[i], alone.turned)
        assert found.unit[i] == alone.unit


def test_kernels_note_the_largest_magnitude_of_what_they_write():
    x, branch, d_y, weight = (*(numbers(6, 48, seed=i) for i in range(3)), numbers(48, seed=3))
    largest = slots()
    total, y, rstd = rmsnorm.add_norm_forward(x, branch, weight, 1e-6, largest=largest)
    assert magnitude(largest) == float(y.abs().max())
    largest, partial = slots(), torch.zeros(2, 48, device=DEVICE)
    d_x = rmsnorm.add_norm_backward((total, rstd, weight), d_y, x, partial, largest=largest)
    assert magnitude(largest) == float(d_x.abs().max())
    gate_up, d_act = numbers(5, 160, seed=4), numbers(5, 80, seed=5)
    for alternating in (False, True):
        largest = slots()
        act = swiglu.swiglu_forward(gate_up, alternating, largest=largest)
        assert magnitude(largest) == float(act.abs().max())
        largest = slots()
        d_gate_up = swiglu.swiglu_backward_(gate_up.clone(), d_act, alternating, largest=largest)
        assert magnitude(largest) == float(d_gate_up.abs().max())
