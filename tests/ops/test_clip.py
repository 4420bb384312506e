import pytest
import torch

from forgetrain.ops.clip import VARIANTS
from tests.ops.oracle import randn, relative


@pytest.mark.parametrize("limit", [0.5, 1e6])
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_shrink_to_the_limit_and_only_when_above_it(name, limit):
    grads = [randn(6, 5, seed=0), randn(7, seed=1)]
    flat = torch.cat([g.flatten() for g in grads]).double()
    norm = VARIANTS[name].forward(grads, limit)
    assert norm.dtype == torch.float32
    assert relative(norm, flat.norm()) < 1e-6
    expected = flat * min(1.0, limit / float(flat.norm()))
    assert relative(torch.cat([g.flatten() for g in grads]), expected) < 5e-6


@pytest.mark.parametrize("name", VARIANTS)
def test_a_norm_that_is_not_finite_is_reported(name):
    assert not torch.isfinite(VARIANTS[name].forward([torch.tensor([1.0, float("nan")])], 1.0))


def test_torch_variant_has_torchs_bits():
    grads = [randn(6, 5, seed=0), randn(7, seed=1)]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    assert torch.equal(VARIANTS["torch"].forward(grads, 0.5), expected)
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, parameters, strict=True))
