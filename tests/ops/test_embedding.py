import pytest
import torch

from forgetrain.ops.embedding import VARIANTS
from tests.ops.oracle import DTYPES, check, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, dtype):
    tokens = torch.tensor([[3, 1, 3], [0, 3, 6]])
    variant = VARIANTS[name]
    weight = randn(7, 12, seed=0)
    check(lambda w: variant.forward(tokens, w), variant.backward, lambda w: w[tokens], [weight], dtype, grads=1)
