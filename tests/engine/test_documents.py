"""A token of one document has no influence at all on another document's loss and gradients, through the contract."""

import pytest
import torch

from forgetrain.engine.contract import make_batch
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.numerics.init import initial_weights
from tests.tiny import tiny_target

EXPLICIT = Plan.textbook()
HOPPER = Plan({"schedule": "hopper", "attention_library": "flash4"})
CUTS = (5, 11)  # three documents in each row of 16


def step(folder, documents, changed, architecture="qwen3", plan=EXPLICIT):
    """Loss and gradients of the first and third documents, after a token of the second is changed, or not."""
    target = tiny_target(architecture, data={"documents": documents})
    path = folder / f"{documents.replace('+', '-')}.py"
    path.write_text(write_engine(target, plan))
    engine = load_engine(path).build(target.plain(), device="cpu", precision="fp32", mesh=None)
    engine.load(initial_weights(target.model, seed=1))
    tokens = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(7))
    tokens, labels = tokens[:, :-1].clone(), tokens[:, 1:].contiguous()
    if changed:
        tokens[:, 7] = (tokens[:, 7] + 1) % 96
    mask = torch.ones(4, 16)
    mask[:, CUTS[0] - 1 : CUTS[1]] = 0.0
    boundaries = torch.tensor([row * 16 + cut for row in range(4) for cut in CUTS])
    loss = engine.step(make_batch(tokens, labels, mask, boundaries), 1e-3).loss
    gradients = {name: s.tensor for name, s in engine.state().items() if name.startswith("exp_avg/")}
    return loss, gradients


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("documents", ["mask", "mask+reset"])
@pytest.mark.parametrize(
    ("architecture", "plan"), [("qwen3", EXPLICIT), ("minicpm5", HOPPER)], ids=["explicit", "hopper"]
)
def test_other_documents_feel_nothing(tmp_path, architecture, plan, documents):
    if plan == HOPPER:
        pytest.importorskip("triton", reason="Triton is not installed: pip install forgetrain[gpu]")
    (loss, gradients), (other, others) = (
        step(tmp_path, documents, changed, architecture, plan) for changed in (False, True)
    )
    assert torch.equal(loss, other)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    assert all(bool(gradient.any()) for gradient in gradients.values())


def test_without_masks_they_do(tmp_path):
    (loss, gradients), (other, others) = (step(tmp_path, "ignore", changed) for changed in (False, True))
    assert not torch.equal(loss, other)
    assert not all(torch.equal(gradients[name], others[name]) for name in gradients)
