import threading

import pytest
import torch

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import load_engine, write_engine
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


def orders():
    """The order in which each schedule's ``load`` asks for weights."""
    model = tiny_target("qwen3").model
    names = list(model.parameter_shapes())
    vectors = [name for name, shape in model.parameter_shapes().items() if len(shape) == 1]
    matrices = [name for name in names if name not in vectors]
    return {"explicit, fsdp": names, "production, hopper": matrices + vectors}


@pytest.mark.parametrize("schedule", ["explicit", "production", "fsdp", "hopper"])
def test_those_are_the_orders(schedule, tmp_path):
    target = tiny_target("minicpm4" if schedule == "hopper" else "qwen3")
    path = tmp_path / "engine.py"
    path.write_text(write_engine(target, Plan({"schedule": schedule})))
    asked = []

    class Told(InitialWeights):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    engine = load_engine(path).build(target.plain(), device="cpu", precision="fp32", mesh=None)
    engine.load(Told(target.model, 0))
    shapes = target.model.parameter_shapes()
    if schedule in ("production", "hopper"):
        assert [len(shapes[name]) for name in asked] == sorted((len(shape) for shape in shapes.values()), reverse=True)
    assert [name for name in asked if len(shapes[name]) > 1] == [n for n, shape in shapes.items() if len(shape) > 1]


@pytest.mark.parametrize("order", [*orders(), "backwards"])
def test_weights_are_drawn_ahead_whoever_asks(order, monkeypatch):
    model = tiny_target("qwen3").model
    due, drawn_here = initial_weights(model, 3), []
    names = {**orders(), "backwards": list(model.parameter_shapes())[::-1]}[order]
    drawn = InitialWeights._drawn

    def told(self, name):
        if threading.current_thread() is threading.main_thread() and due[name].dim() > 1:
            drawn_here.append(name)
        return drawn(self, name)

    monkeypatch.setattr(InitialWeights, "_drawn", told)
    with AheadWeights(model, 3, cores=2) as weights:
        assert list(weights) == list(due)
        for name in names:
            assert torch.equal(weights[name], due[name])
            assert len(weights._coming) <= 2
        if order != "backwards":
            assert drawn_here == [next(name for name in names if due[name].dim() > 1)]  # the first alone
        assert torch.equal(weights[names[0]], due[names[0]])  # once more


def test_what_is_asked_for_by_name_is_a_mapping_like_any_other():
    model = tiny_target().model
    with AheadWeights(model, 3, cores=2) as weights:
        assert "model.norm.weight" in weights
        assert "nobody.weight" not in weights
        assert weights.get("nobody.weight") is None
        with pytest.raises(KeyError):
            weights["nobody.weight"]
