import torch

from forgetrain.numerics.init import InitialWeights, initial_weights
from tests.tiny import tiny_target


def test_a_tensor_drawn_alone_is_the_one_drawn_among_all():
    model = tiny_target("qwen2").model
    weights, lazy = initial_weights(model, 3), InitialWeights(model, 3)
    assert list(lazy) == list(weights) == list(model.parameter_shapes())
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(lazy[name], weights[name])
    assert lazy[name] is not lazy[name]  # nothing is kept
    assert not torch.equal(lazy[name], InitialWeights(model, 4)[name])
