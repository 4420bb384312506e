import pytest
import torch

from forgetrain.ops.cross_entropy import VARIANTS
from tests.ops.oracle import DTYPES, check, randn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_meets_the_formula(name, dtype):
    variant = VARIANTS[name]
    labels = torch.tensor([0, 12, 5, 5])

    def formula(logits):
        return -torch.log_softmax(logits, -1)[torch.arange(4), labels]

    inputs = [3 * randn(4, 13, seed=0)]
    check(lambda logits: variant.forward(logits, labels), variant.backward, formula, inputs, dtype, grads=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_stay_as_they_were(name):
    logits = randn(4, 13, seed=0)
    before = logits.clone()
    _, saved = VARIANTS[name].forward(logits, torch.tensor([0, 12, 5, 5]))
    VARIANTS[name].backward(saved, torch.ones(4))
    assert torch.equal(logits, before)
