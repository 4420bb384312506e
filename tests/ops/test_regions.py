"""Regions as torch's compiler makes them, against what their text says: it decides in which order memory is read."""

import torch

from forgetrain.ops.regions import entropy_region


def test_a_loss_is_of_the_logits_and_not_of_the_gradient_that_replaces_them():
    """torch 2.11 gathered a label's logit after the gradient had been written over it."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(24, 96, generator=generator)
    labels, d_nll = torch.randint(0, 96, (24,), generator=generator), torch.full((24,), 1 / 24)
    exact = logits.double().requires_grad_()
    due = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (due * d_nll).sum().backward()
    nll = torch.compile(entropy_region, dynamic=False)(logits, labels, d_nll)
    torch.testing.assert_close(nll.double(), due.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=1e-5, atol=1e-7)
