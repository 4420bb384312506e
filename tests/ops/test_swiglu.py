import pytest
import torch

from forgetrain.ops.swiglu import VARIANTS
from tests.ops.oracle import DTYPES, check, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, dtype):
    variant = VARIANTS[name]
    inputs = [randn(9, 16, seed=0), randn(9, 16, seed=1)]
    check(variant.forward, variant.backward, lambda g, u: g * torch.sigmoid(g) * u, inputs, dtype, grads=2)
