import pytest
import torch

from forgetrain.ops.adamw import VARIANTS
from tests.ops.oracle import randn, relative

RECIPE = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1}


def oracle(p, grads):
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = RECIPE["beta1"] * m + (1 - RECIPE["beta1"]) * g
        v = RECIPE["beta2"] * v + (1 - RECIPE["beta2"]) * g**2
        step = m / (1 - RECIPE["beta1"] ** t) / ((v / (1 - RECIPE["beta2"] ** t)).sqrt() + RECIPE["eps"])
        p = p - RECIPE["lr"] * (step + RECIPE["decay"] * p)
    return p


@pytest.mark.parametrize("name", VARIANTS)
def test_five_updates_meet_the_formula(name):
    p, grads = randn(6, 5, seed=0), [randn(6, 5, seed=i) for i in range(1, 6)]
    expected = oracle(p.double(), [g.double() for g in grads])
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, grad in enumerate(grads, 1):
        VARIANTS[name].forward(p, grad, m, v, t, *RECIPE.values())
    assert relative(p, expected) < 1e-6


@pytest.mark.parametrize("foreach", [False, True])
def test_torchs_variants_have_the_bits_of_torchs_adamw(foreach):
    p = randn(6, 5, seed=0)
    parameter = torch.nn.Parameter(p.clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "foreach": foreach}
    optimizer = torch.optim.AdamW([parameter], **options)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t in range(1, 6):
        grad = randn(6, 5, seed=t)
        parameter.grad = grad.clone()
        optimizer.step()
        VARIANTS["foreach" if foreach else "torch"].forward(p, grad, m, v, t, *RECIPE.values())
        assert torch.equal(p, parameter.detach())
