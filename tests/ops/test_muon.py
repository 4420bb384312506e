import pytest
import torch

from forgetrain.numerics.oracle import orthogonal
from forgetrain.ops.muon import VARIANTS
from tests.ops.oracle import randn, relative

LR, MOMENTUM, DECAY = 1e-2, 0.95, 0.1
SHAPES = [(12, 20), (20, 12), (8, 8)]


def oracle(p, grads):
    m = torch.zeros_like(p)
    for g in grads:
        m = MOMENTUM * m + (1 - MOMENTUM) * g
        u = (1 - MOMENTUM) * g + MOMENTUM * m
        p = p - LR * (0.2 * max(p.shape) ** 0.5 * orthogonal(u) + DECAY * p)
    return p


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "near"), [("textbook", 1e-6), ("torch", 1e-3)])
def test_five_updates_meet_the_formula(name, near, shape):
    p, grads = randn(*shape, seed=0), [randn(*shape, seed=i) for i in range(1, 6)]
    expected = oracle(p.double(), [g.double() for g in grads])
    m = torch.zeros_like(p)
    for grad in grads:
        VARIANTS[name].forward(p, grad, m, LR, MOMENTUM, DECAY)
    assert relative(p, expected) < near


def test_the_iteration_brings_singular_values_near_one():
    u, _, v = torch.linalg.svd(randn(12, 20, seed=1).double(), full_matrices=False)
    values = torch.logspace(-2, 0, 12, dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonal(u @ torch.diag(values) @ v))
    assert found.min() > 0.6
    assert found.max() < 1.3


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_variant_has_the_bits_of_torchs_muon(shape):
    p = randn(*shape, seed=0)
    parameter = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.Muon([parameter], LR, DECAY, MOMENTUM, adjust_lr_fn="match_rms_adamw")
    m = torch.zeros_like(p)
    for t in range(1, 6):
        parameter.grad = randn(*shape, seed=t)
        optimizer.step()
        VARIANTS["torch"].forward(p, parameter.grad.clone(), m, LR, MOMENTUM, DECAY)
        assert torch.equal(p, parameter.detach())
        assert torch.equal(m, optimizer.state[parameter]["momentum_buffer"])
