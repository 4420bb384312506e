import math

import pytest
import torch

from forgetrain.ops.rope import TABLES, VARIANTS
from tests.ops.oracle import DTYPES, check, randn


def rotated(x, positions, theta):
    """The formula, pair by pair: (x[i], x[i + K/2]) turned by position · theta^(-2i/K)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions.double() * theta ** (-2 * i / x.shape[-1])
        cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, dtype):
    variant = VARIANTS[name]
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    cos, sin = TABLES["textbook"].forward(positions, 8, 100.0)
    check(
        lambda x: variant.forward(x, cos, sin),
        variant.backward,
        lambda x: rotated(x, positions, 100.0),
        [randn(2, 4, 3, 8, seed=0)],
        dtype,
        grads=1,
    )


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_each_angle_at_both_places_of_its_pair(name):
    cos, sin = TABLES[name].forward(torch.arange(50)[None], 8, 10000.0)
    assert cos.shape == sin.shape == (1, 50, 8)
    assert cos.dtype == torch.float32
    assert torch.equal(cos[..., :4], cos[..., 4:])
    assert math.isclose(float(sin[0, 7, 2]), math.sin(7 * 10000.0 ** (-4 / 8)), rel_tol=1e-6)
