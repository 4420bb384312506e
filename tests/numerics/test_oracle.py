"""The oracle agrees with the written engines in fp32, tap by tap, on every architecture."""

from __future__ import annotations

import pytest
import torch

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.numerics.init import initial_weights
from forgetrain.numerics.oracle import oracle_step
from forgetrain.spec.taps import tap_names
from tests.tiny import ARCHITECTURES, random_batch, tiny_target


def close(actual: torch.Tensor, exact: torch.Tensor, name: str, tolerance: float = 1e-5) -> None:
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape, name
    error = (actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert error < tolerance or (actual.double() - exact).norm() < 1e-9, f"{name}: {error}"


@pytest.mark.parametrize(
    ("architecture", "documents"),
    [*((name, "ignore") for name in ARCHITECTURES), ("minicpm5", "mask"), ("qwen3", "mask+reset")],
)
def test_the_textbook_engine_is_near_the_oracle(tmp_path, architecture, documents):
    target = tiny_target(architecture, data={"documents": documents})
    path = tmp_path / "engine.py"
    path.write_text(write_engine(target, Plan.textbook()))
    engine = load_engine(path).build(target.plain(), device="cpu", precision="fp32", mesh=None)
    torch.manual_seed(1)
    weights = {
        n: w * 3 if w.dim() > 1 else w + 0.1 * torch.randn_like(w) for n, w in initial_weights(target.model, 1).items()
    }
    batch = random_batch(target, 2, documents=True)
    engine.load(weights)
    exact = oracle_step(target, weights, batch, 1e-2, taps=True)
    names = tap_names(target.model, 2)
    assert [name for name, _ in exact.taps] == [name for name in names if "@" in name]
    found = dict(engine.probe(batch))
    for name, tensor in exact.taps:
        close(found[name], tensor, name)
    for name in weights:
        close(found[f"{name}#grad"], exact.grads[name], name)
        close(found[f"{name}#clipped"], exact.clipped[name], name)
    result = engine.step(batch, 1e-2)
    close(result.loss, exact.loss, "loss")
    close(result.grad_norm, exact.grad_norm, "norm")
    for name in weights:
        # AdamW's first step is the gradient's sign, so a gradient that is nothing but rounding moves a weight by lr
        close(engine.state()[f"master/{name}"].tensor, exact.master[name], name, 1e-3)
