"""Ranks that share the positions of every row, against one that has them all. Shapes are (data, tensor, context)."""

import pytest

from forgetrain.engine.contract import weight_hash
from forgetrain.engine.plan import SCALE, Plan
from forgetrain.engine.process import EngineProcess
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.parallel import Parallel
from forgetrain.spec.target import parse_target
from tests.engine.test_scale import RATE, assert_near, assert_same, module_of, on_ranks
from tests.tiny import random_batch, tiny_target

SINGLE = {"micro_batch_size": 1}


def over(target, context, tensor=1):
    return target.model_copy(update={"parallel": Parallel(context=context, tensor=tensor)})


def parted(target, folder, **choices):
    return module_of(target, folder, attention_kernel="blocked", **choices)


def test_two_ranks_that_share_rows_compute_what_one_does(tmp_path):
    target = tiny_target("qwen3", data={"documents": "mask+reset"})
    alone = on_ranks(1, module_of(target, tmp_path), target)
    assert_near(on_ranks((1, 1, 2), parted(over(target, 2), tmp_path), over(target, 2)), alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "documents"), [("qwen2", "ignore"), ("minicpm4", "mask"), ("tied", "mask+reset")]
)
def test_four_ranks_that_share_rows(architecture, documents, tmp_path):
    target = tiny_target(architecture, recipe=SINGLE, data={"documents": documents})
    alone = on_ranks(1, module_of(target, tmp_path), target)
    module = parted(over(target, 4), tmp_path)
    found = on_ranks((1, 1, 4), module, over(target, 4))
    assert_near(found, alone)
    assert_same(on_ranks((1, 1, 4), module, over(target, 4)), found)


@pytest.mark.slow
@pytest.mark.parametrize("state", SCALE["optimizer_state"][0])
def test_data_and_context_ranks_go_on_with_each_others_states(state, tmp_path):
    target = tiny_target("qwen3", recipe=SINGLE, data={"documents": "mask"})
    whole, split = module_of(target, tmp_path), over(target, 2)
    alone = on_ranks(1, whole, target)
    module = parted(split, tmp_path, optimizer_state=state)
    found = on_ranks((2, 1, 2), module, split)
    assert_near(found, alone)
    half = on_ranks((2, 1, 2), module, split, last=2)
    rest = on_ranks((2, 1, 2), module, split, first=2, state=half[2])
    assert_same((half[0] + rest[0], *rest[1:]), found)
    assert_near(on_ranks(1, whole, target, first=2, state=half[2]), (alone[0][2:], *alone[1:]))


@pytest.mark.slow
def test_context_and_tensor_ranks_together(tmp_path):
    target = tiny_target("qwen3", recipe=SINGLE, data={"documents": "mask"})
    alone = on_ranks(1, module_of(target, tmp_path), target)
    split = over(target, 2, tensor=2)
    assert_near(on_ranks((1, 2, 2), parted(split, tmp_path), split), alone)


@pytest.mark.slow
def test_muon_steps_what_context_ranks_have_added(tmp_path):
    target = tiny_target(recipe={**SINGLE, "optimizer": "muon"})
    alone = on_ranks(1, module_of(target, tmp_path), target)
    assert_near(on_ranks((1, 1, 2), parted(over(target, 2), tmp_path), over(target, 2)), alone)


@pytest.mark.slow
def test_shared_rows_in_bf16_stay_within_its_rounding(tmp_path):
    target = tiny_target(recipe=SINGLE, data={"documents": "mask"})
    options = {"precision": "bf16", "last": 1}  # later steps start from weights that rounding has moved
    (alone,), *_ = on_ranks(1, module_of(target, tmp_path), target, **options)
    (found,), *_ = on_ranks((1, 1, 2), parted(over(target, 2), tmp_path), over(target, 2), **options)
    assert found[0] == pytest.approx(alone[0], rel=1e-3)
    assert found[1] == pytest.approx(alone[1], rel=1e-2)


@pytest.mark.slow
def test_an_engines_processes_share_rows(tmp_path):
    target = tiny_target(recipe=SINGLE)
    (alone, *_), _, state = on_ranks(1, module_of(target, tmp_path), target, last=1)
    parted(over(target, 2), tmp_path)
    batch = random_batch(target, 0, documents=True)
    with EngineProcess(tmp_path / "engine.py", over(target, 2), ranks=2, threads=1) as engine:
        engine.load(initial_weights(target.model, seed=1))
        held_out = engine.loss(batch)
        result = engine.step(batch, RATE)
        found = engine.state()
    assert (float(result.loss), float(result.grad_norm)) == pytest.approx(alone[:2], rel=1e-5)
    assert float(held_out) == pytest.approx(alone[0], rel=1e-5)
    assert_near(([], 0.0, found), ([], 0.0, state))
    assert weight_hash(found)


def test_what_cannot_share_rows_is_one_line(tmp_path):
    target = over(tiny_target(), 2)
    for schedule in ("explicit", "hopper"):
        with pytest.raises(UserError, match=f"the {schedule} schedule computes whole rows") as refused:
            write_engine(target, Plan({"schedule": schedule}))
        assert refused.value.key == "parallel.context"
    with pytest.raises(UserError, match='attention_kernel = "blocked"'):
        write_engine(target, Plan({"schedule": "production", "attention_kernel": "native"}))
    tree = tiny_target().plain()
    for section in ("recipe", "gates"):
        odd = tree | {"parallel": {"context": 2}, section: tree[section] | {"sequence_length": 18}}
        with pytest.raises(UserError, match=rf"{section}.sequence_length = 18 does not divide into 4 chunks"):
            parse_target(odd)
    stages = [{"name": "long", "steps": tree["recipe"]["steps"], "sequence_length": 22}]
    with pytest.raises(UserError, match="'long': sequence_length = 22 does not divide into 4 chunks"):
        parse_target(tree | {"parallel": {"context": 2}, "data": tree["data"] | {"stages": stages}})
    path = tmp_path / "engine.py"
    module = parted(target, tmp_path)
    for ranks, whole, problem in ((3, target, "ranks, which are 3"), (2, over(target, 2, 2), "are 2, 2 to a layer")):
        with pytest.raises(UserError, match=f"parallel.context: does not divide the engine's .*{problem}"):
            EngineProcess(path, whole, ranks=ranks)
    with pytest.raises(ValueError, match="for a mesh with 2 context ranks"):
        module.build(target.plain(), device="cpu", precision="fp32", mesh=None)
