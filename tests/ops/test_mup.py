import pytest

from forgetrain.ops.mup import VARIANTS
from tests.ops.oracle import DTYPES, check, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, dtype):
    variant = VARIANTS[name]
    check(
        lambda x: variant.forward(x, 6.0), variant.backward, lambda x: x / 6.0, [randn(9, 16, seed=0)], dtype, grads=1
    )
