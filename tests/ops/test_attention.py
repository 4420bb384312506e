import pytest
import torch

from forgetrain.ops.attention import VARIANTS
from tests.ops.oracle import DTYPES, check, randn


def formula(q, k, v, allowed):
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("nshd,nthd->nhst", q, k) / q.shape[3] ** 0.5
    probabilities = scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1)
    return torch.einsum("nhst,nthd->nshd", probabilities, v)


def documents(n, s):
    """Rows of two documents each, cut after the third token."""
    number = (torch.arange(s) >= 3).long().expand(n, s)
    return (number[:, :, None] == number[:, None, :]) & torch.ones(s, s, dtype=torch.bool).tril()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, heads, masked, dtype):
    variant, (n, s, d) = VARIANTS[name], (2, 9, 8)
    triangle = torch.ones(1, s, s, dtype=torch.bool).tril()
    allowed = documents(n, s) if masked else None
    inputs = [randn(n, s, heads[0], d, seed=0), randn(n, s, heads[1], d, seed=1), randn(n, s, heads[1], d, seed=2)]
    check(
        lambda q, k, v: variant.forward(q, k, v, allowed),
        variant.backward,
        lambda q, k, v: formula(q, k, v, triangle if allowed is None else allowed),
        inputs,
        dtype,
        grads=3,
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_masked_document_has_exactly_no_influence(name):
    variant, (n, s) = VARIANTS[name], (1, 8)
    q, k, v = (randn(n, s, 2, 8, seed=i) for i in range(3))
    before = variant.forward(q, k, v, documents(n, s))[0]
    k[:, :3], v[:, :3] = k[:, :3] + 100.0, v[:, :3] - 100.0
    after = variant.forward(q, k, v, documents(n, s))[0]
    assert torch.equal(before[:, 3:], after[:, 3:])
