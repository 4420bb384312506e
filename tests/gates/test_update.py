"""G4.update: the update follows from the engine's own moments, and anything else shows."""

from __future__ import annotations

import copy

import pytest
import torch

from forgetrain.engine.contract import Shard
from forgetrain.gates.update import update
from forgetrain.ops.adamw import adamw_textbook_forward
from tests.tiny import tiny_target

RECIPE = tiny_target().recipe
LR = 1e-2


def states(steps: int = 1, *, scale: float = 0.05, adamw=adamw_textbook_forward, norms: bool = False):
    """(before, after) around the last of ``steps`` steps of a matrix and a vector; and the last gradients' norm."""
    generator = torch.Generator().manual_seed(3)
    weights = {"matrix.weight": torch.randn(8, 6, generator=generator), "norm.weight": torch.ones(6)}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    before, norm = {}, 0.0

    def snapshot(step: int):
        tensors = {"step": torch.tensor(step)}
        for name, weight in weights.items():
            tensors |= {f"master/{name}": weight, f"exp_avg/{name}": moments[name][0]}
            tensors[f"exp_avg_sq/{name}"] = moments[name][1]
        return {key: Shard(t.clone(), tuple(t.shape), (0,) * t.dim()) for key, t in tensors.items()}

    r = RECIPE
    for step in range(1, steps + 1):
        before, squares = snapshot(step - 1), 0.0
        for name, weight in weights.items():
            grad = torch.randn(weight.shape, generator=generator) * scale
            squares += float(grad.double().square().sum())
            decay = r.weight_decay if weight.dim() > 1 else 0.0
            adamw(weight, grad, *moments[name], step, LR, r.beta1, r.beta2, r.eps, decay)
        norm = squares**0.5
    return before, snapshot(steps), norm


@pytest.mark.parametrize("steps", [1, 2, 50])
@pytest.mark.parametrize("scale", [1e-6, 0.05])
def test_the_textbook_update_passes(steps, scale):
    before, after, norm = states(steps, scale=scale)
    assert update(before, after, LR, RECIPE, grad_norm=norm if steps == 1 else None).passed


def wrong(**changes):
    """AdamW with other arguments than it was given."""
    names = ("p", "g", "m", "v", "t", "lr", "beta1", "beta2", "eps", "decay")

    def adamw(*values):
        arguments = dict(zip(names, values, strict=True))
        for name, change in changes.items():
            arguments[name] = change(arguments)
        adamw_textbook_forward(*(arguments[name] for name in names))

    return adamw


@pytest.mark.parametrize(
    "adamw",
    [
        wrong(decay=lambda a: 0.0),
        wrong(decay=lambda a: 0.1),  # of vectors too
        wrong(eps=lambda a: 1e-6),
        wrong(beta2=lambda a: 0.951),
        wrong(lr=lambda a: a["lr"] * 1.0001),
        wrong(t=lambda a: a["t"] + 1),  # a bias correction that is one step late
        lambda p, *rest: p.copy_(p.bfloat16()).add_(0.0) if rest else None,  # nothing but a rounded master
    ],
)
def test_any_other_update_fails(adamw):
    # gradients of the size of AdamW's epsilon, so that a wrong one shows
    before, after, _ = states(2, scale=1e-6, adamw=adamw)
    assert not update(before, after, LR, RECIPE).passed


@pytest.mark.parametrize("key", ["master/matrix.weight", "exp_avg_sq/norm.weight", "exp_avg/matrix.weight"])
@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_a_single_element_is_enough(key, value):
    before, after, _ = states(3)
    after = copy.deepcopy(after)
    after[key].tensor.view(-1)[0] += value
    verdict = update(before, after, LR, RECIPE)
    assert not verdict.passed
    assert verdict.first_divergence.endswith(key.partition("/")[2])


def test_the_norm_that_was_returned_is_the_clipped_gradients():
    before, after, norm = states(1)
    assert not update(before, after, LR, RECIPE, grad_norm=norm * 1.01).passed
    assert not update(before, after, LR, RECIPE, grad_norm=float("nan")).passed


def test_the_step_counter_counts():
    before, after, _ = states(2)
    assert not update(before, {**after, "step": before["step"]}, LR, RECIPE).passed


def test_a_counter_below_zero_is_no_number_of_steps():
    """The moments' corrections overflow there."""
    before, after, _ = states()
    for state, step in ((before, -100_001), (after, -100_000)):
        state["step"] = state["step"]._replace(tensor=torch.tensor(step))
    verdict = update(before, after, LR, RECIPE)
    assert not verdict.passed
    assert verdict.first_divergence == "step"
