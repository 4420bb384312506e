import pytest

from forgetrain.ops.linear import VARIANTS
from tests.ops.oracle import DTYPES, check, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, bias, dtype):
    variant = VARIANTS[name]
    inputs = [randn(9, 16, seed=0), randn(5, 16, seed=1)] + ([randn(5, seed=2)] if bias else [])
    check(
        lambda x, w, b=None: variant.forward(x, w, b),
        variant.backward,
        lambda x, w, b=None: x @ w.t() + (0 if b is None else b),
        inputs,
        dtype,
        grads=len(inputs),
    )
