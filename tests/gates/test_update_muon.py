"""G4.update on matrices that Muon steps: torch's own passes, any other rule shows."""

from __future__ import annotations

import pytest
import torch

from forgetrain.engine.contract import Shard
from forgetrain.gates.update import update
from forgetrain.ops.muon import VARIANTS
from tests.tiny import tiny_target

NAME = "model.layers.0.mlp.up_proj.weight"
RECIPE = tiny_target(recipe={"optimizer": "muon"}, reference={"name": "transformers"}).recipe
LR = 1e-3


def shards(step, weight, average):
    tensors = {"step": torch.tensor(step), f"master/{NAME}": weight, f"exp_avg/{NAME}": average}
    return {key: Shard(t.clone(), tuple(t.shape), (0,) * t.dim()) for key, t in tensors.items()}


def verdict(step_of=VARIANTS["torch"].forward, *, shape=(96, 32), steps=3, recipe=RECIPE):
    generator = torch.Generator().manual_seed(3)
    weight, average = torch.randn(shape, generator=generator) * 0.3, torch.zeros(shape)
    before, norm = {}, 0.0
    for step in range(steps):
        before = shards(step, weight, average)
        # few directions and much noise, as gradients are
        gradient = torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
        gradient = (gradient + 0.1 * torch.randn(shape, generator=generator)) / 200
        norm = float(gradient.norm())
        step_of(weight, gradient, average, LR, recipe.muon_momentum, recipe.weight_decay)
    return update(before, shards(steps, weight, average), LR, recipe, grad_norm=norm if steps == 1 else None)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(96, 32), (32, 80), (32, 32)])
@pytest.mark.parametrize("steps", [1, 4])
def test_muon_passes(variant, shape, steps):
    found = verdict(VARIANTS[variant].forward, shape=shape, steps=steps)
    assert found.passed, found.explanation


def rule(*, scale=1.0, iterations=5, nesterov=True, decay=1.0, split=1):
    """Muon's textbook rule with one thing changed."""

    def step(p, g, m, lr, momentum, weight_decay):
        m.mul_(momentum).add_(g, alpha=1 - momentum)
        u = g * (1 - momentum) + m * momentum if nesterov else m
        parts = []
        for part in u.chunk(split):
            x = part.t() if part.shape[0] > part.shape[1] else part
            x = x / x.norm()
            for _ in range(iterations):
                gram = x @ x.t()
                x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
            parts.append(x.t() if part.shape[0] > part.shape[1] else x)
        p.mul_(1 - lr * weight_decay * decay).sub_(lr * 0.2 * max(p.shape) ** 0.5 * scale * torch.cat(parts))

    return step


def test_the_rule_itself_passes():
    assert verdict(rule()).passed


@pytest.mark.parametrize(
    "change",
    [
        {"scale": 1.03},
        {"scale": (96 / 32) ** 0.5 / (0.2 * 96**0.5)},  # Keller Jordan's scale for lr, in place of Moonshot's
        {"iterations": 4},
        {"iterations": 6},
        {"nesterov": False},
        {"decay": 0.0},
        {"decay": 2.0},
        {"split": 2},  # two matrices in one, each made orthogonal by itself
    ],
    ids=str,
)
def test_any_other_rule_fails(change):
    assert not verdict(rule(**change)).passed


def test_adamw_in_its_place_fails():
    def adam(p, g, m, lr, momentum, decay):
        m.lerp_(g, 1 - momentum)
        p.mul_(1 - lr * decay).sub_(lr * m.sign())

    assert not verdict(adam).passed
