import pytest
import torch

from forgetrain.ops.rmsnorm import VARIANTS
from tests.ops.oracle import DTYPES, TOLERANCE, check, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 3, 16)])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, shape, dtype):
    variant, eps = VARIANTS[name], 1e-3

    def formula(x, w):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * w

    inputs = [randn(*shape, seed=0), 1 + 0.1 * randn(shape[-1], seed=1)]
    check(lambda x, w: variant.forward(x, w, eps), variant.backward, formula, inputs, dtype, grads=2)


def test_transformers_order_rounds_before_the_weight():
    x, w = randn(64, 32, seed=0).bfloat16(), (1 + 0.3 * randn(32, seed=1)).bfloat16()
    ours = {name: variant.forward(x, w, 1e-6)[0] for name, variant in VARIANTS.items()}
    assert not torch.equal(ours["hf"], ours["torch"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_the_gradient_past_the_norm_is_added(name, dtype):
    x, w, d_out, d_residual = (randn(6, 32, seed=i).to(dtype) for i in range(4))
    _, saved = VARIANTS[name].forward(x, w[0], 1e-6)
    alone = VARIANTS[name].backward(saved, d_out)[0]
    _, saved = VARIANTS[name].forward(x, w[0], 1e-6)
    joined = VARIANTS[name].backward(saved, d_out, d_residual)[0]
    assert float((joined.double() - alone.double() - d_residual.double()).norm() / joined.norm()) < TOLERANCE[dtype]
