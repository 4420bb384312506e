import pytest

from forgetrain.ops.residual import VARIANTS
from tests.ops.oracle import DTYPES, check, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.2857738])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, scale, dtype):
    variant, x = VARIANTS[name], randn(9, 16, seed=0).to(dtype)
    check(
        lambda branch: variant.forward(x, branch, scale),
        variant.backward,
        lambda branch: x.double() + branch * (1.0 if scale is None else scale),
        [randn(9, 16, seed=1)],
        dtype,
        grads=1,
    )
