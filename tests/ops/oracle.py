"""How op variants are checked: forward and backward against autograd through the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Relative RMS error that a right variant stays under, by dtype.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def check(
    forward: Callable, backward: Callable, formula: Callable, inputs: list[Tensor], dtype: torch.dtype, grads: int
) -> None:
    """``forward(*inputs) -> (out, saved)``; ``backward(saved, d_out)``: gradients of the first ``grads`` inputs."""
    low = [x.to(dtype) for x in inputs]
    leaves = [x.double().requires_grad_() for x in low]
    expected = formula(*leaves)
    out, saved = forward(*low)
    assert out.dtype in (dtype, torch.float32)
    assert out.shape == expected.shape
    assert relative(out, expected.detach()) < TOLERANCE[dtype]
    d_out = randn(*expected.shape, seed=99).to(out.dtype)
    wanted = torch.autograd.grad(expected, leaves[:grads], d_out.double())
    found = backward(saved, d_out)
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == grads
    for actual, want, source in zip(found, wanted, low, strict=False):
        assert actual.shape == want.shape
        assert actual.dtype == source.dtype
        assert relative(actual, want) < TOLERANCE[dtype]
