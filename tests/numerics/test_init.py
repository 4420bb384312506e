import pytest
import torch

from forgetrain.numerics.init import AheadWeights, InitialWeights, initial_weights
from tests.tiny import tiny_target


def test_a_tensor_drawn_alone_is_the_one_drawn_among_all():
    model = tiny_target("qwen2").model
    weights, lazy = initial_weights(model, 3), InitialWeights(model, 3)
    assert list(lazy) == list(weights) == list(model.parameter_shapes())
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(lazy[name], weights[name])
    assert lazy[name] is not lazy[name]  # nothing is kept
    assert not torch.equal(lazy[name], InitialWeights(model, 4)[name])


@pytest.mark.parametrize("order", ["theirs", "backwards", "every third"])
def test_weights_drawn_ahead_are_the_same_in_any_order_and_few_at_a_time(order):
    model = tiny_target("qwen2").model
    due, names = initial_weights(model, 3), list(model.parameter_shapes())
    names = {"theirs": names, "backwards": names[::-1], "every third": names[::3] + names[1::3] + names[2::3]}[order]
    with AheadWeights(model, 3, cores=2) as weights:
        assert list(weights) == list(due)
        for name in names:
            assert torch.equal(weights[name], due[name])
            assert len(weights._coming) <= 2
        assert torch.equal(weights[names[0]], due[names[0]])  # once more
