"""The production schedule on several ranks against itself on one."""

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from forgetrain.engine.contract import Batch, Shard, weight_hash
from forgetrain.engine.plan import SCALE, Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.parallel import Parallel
from tests.engine.ranks import run_ranks
from tests.tiny import random_batch, tiny_target

STEPS, RATE = 4, 1e-2
SINGLE = {"micro_batch_size": 1}


def module_of(target, folder, **choices):
    """The engine with its regions uncompiled: the arithmetic is the same, and compiling takes seconds a region."""
    plan = Plan({"schedule": "production", "rope_tables": "fp32", **choices})
    path = folder / "engine.py"
    path.write_text(write_engine(target, plan).replace("@torch.compile(dynamic=False)\n", ""))
    return load_engine(path)


def rows_of(batch: Batch, rank: int, ranks: int) -> Batch:
    n, s = batch.tokens.shape
    rows = slice(rank * n // ranks, (rank + 1) * n // ranks)
    first, last = rows.start * s, rows.stop * s
    inside = batch.cu_seqlens[(batch.cu_seqlens >= first) & (batch.cu_seqlens < last)] - first
    cuts = torch.full((last - first + 1,), last - first, dtype=torch.int32)
    cuts[: inside.numel()] = inside
    return Batch(batch.tokens[rows], batch.labels[rows], batch.mask[rows], cuts, batch.loss_denominator)


def take_steps(module, target, mesh: DeviceMesh | None, first=0, last=STEPS, state=None, precision="fp32"):
    """Trains, and gives the steps' results, the state that this rank holds, and its own bytes of it."""
    engine = module.build(target.plain(), device="cpu", precision=precision, mesh=mesh)
    engine.load(initial_weights(target.model, seed=1))
    if state is not None:
        engine.restore(state)
    rank, ranks = (0, 1) if mesh is None else (mesh.get_local_rank("data"), mesh["data"].size())
    results = []
    for seed in range(first, last):
        result = engine.step(rows_of(random_batch(target, seed, documents=True), rank, ranks), RATE)
        results.append((float(result.loss), float(result.grad_norm), bool(result.applied)))
    held_out = float(engine.loss(random_batch(target, 9)))
    return (
        results,
        held_out,
        {name: shard._replace(tensor=shard.tensor.clone()) for name, shard in engine.state().items()},
    )


def merged(answers) -> dict[str, Shard]:
    """The ranks' states put together; what several hold must be equal, and nothing may be missing."""
    whole: dict[str, torch.Tensor] = {}
    for _, _, state in answers:
        for name, (tensor, shape, offsets) in state.items():
            into = whole.setdefault(name, torch.full(shape, torch.nan) if shape else tensor.clone())
            box = tuple(slice(at, at + n) for at, n in zip(offsets, tensor.shape, strict=True))
            assert torch.isnan(into[box]).all() or torch.equal(into[box], tensor), name
            into[box] = tensor
    assert not any(torch.isnan(tensor).any() for tensor in whole.values())
    return {name: Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in whole.items()}


def on_ranks(shape, module, target, **options):
    """(results, held-out loss, whole state) of so many ranks, which must agree."""
    if shape == 1:
        results, held_out, state = take_steps(module, target, None, **options)
        return results, held_out, state
    answers = run_ranks(shape, partial(take_steps_on, module, target, options))
    assert all(answer[:2] == answers[0][:2] for answer in answers)
    return *answers[0][:2], merged(answers)


def take_steps_on(module, target, options, mesh):
    return take_steps(module, target, mesh, **options)


def assert_near(found, expected, tolerance=1e-5):
    for one, other in zip(found[0], expected[0], strict=True):
        assert one == pytest.approx(other, rel=tolerance)
    assert found[1] == pytest.approx(expected[1], rel=tolerance)
    for name, shard in expected[2].items():
        if name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding, which AdamW scales up
            continue
        difference = (found[2][name].tensor.double() - shard.tensor.double()).norm()
        assert float(difference) <= 20 * tolerance * float(shard.tensor.double().norm()), name


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[2].keys() == expected[2].keys()
    for name, shard in expected[2].items():
        assert torch.equal(found[2][name].tensor, shard.tensor), name


@pytest.mark.parametrize("architecture", ["qwen3", "tied", "qwen2"])
def test_sharded_states_are_the_replicated_ones(architecture, tmp_path):
    target = tiny_target(architecture, recipe=SINGLE, data={"documents": "mask+reset"})
    replicated = module_of(target, tmp_path, optimizer_state="replicated")
    alone, both = on_ranks(1, replicated, target), on_ranks(2, replicated, target)
    sharded = module_of(target, tmp_path, optimizer_state="sharded")
    assert_same(on_ranks(1, sharded, target), alone)
    assert_near(both, alone)
    found = on_ranks(2, sharded, target)
    assert_near(found, both, 1e-6)  # a sum of two has one value: only the norm, over parts, rounds otherwise
    assert_near(on_ranks(4, sharded, target), alone)
    assert_same(on_ranks(2, sharded, target), found)


def test_every_rank_keeps_its_part_of_the_states_alone(tmp_path):
    target = tiny_target(recipe=SINGLE)
    module = module_of(target, tmp_path, optimizer_state="sharded")
    whole = sum(torch.Size(shape).numel() for shape in target.model.parameter_shapes().values())
    for ranks in (2, 4):
        answers = run_ranks(ranks, partial(take_steps_on, module, target, {"last": 1}))
        kept = [sum(shard.tensor.numel() for shard in state.values()) - 1 for _, _, state in answers]
        assert sum(kept) == 3 * whole  # master and two moments, each element on one rank
        row = max(target.model.intermediate_size, target.model.hidden_size)
        assert max(kept) <= 3 * (whole // ranks + row)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_run_goes_on_bit_for_bit_and_on_other_numbers_of_ranks(precision, tmp_path):
    target = tiny_target("minicpm4", recipe=SINGLE)
    module = module_of(target, tmp_path, optimizer_state="sharded")
    whole = on_ranks(2, module, target, precision=precision)
    half = on_ranks(2, module, target, last=2, precision=precision)
    rest = on_ranks(2, module, target, first=2, state=half[2], precision=precision)
    assert_same((half[0] + rest[0], *rest[1:]), whole)
    state, results = None, []
    for step, ranks in enumerate((1, 2, 1, 4)):
        part = on_ranks(ranks, module, target, first=step, last=step + 1, state=state, precision=precision)
        state, results = part[2], results + part[0]
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for found, expected in zip(results, whole[0], strict=True):
        assert found == pytest.approx(expected, rel=tolerance)
    assert weight_hash(state) != weight_hash(initial_weights_of(target))


def initial_weights_of(target):
    return {f"master/{name}": tensor for name, tensor in initial_weights(target.model, seed=1).items()}


def test_a_norm_that_is_not_finite_moves_nothing_on_any_rank(tmp_path):
    target = tiny_target(recipe=SINGLE)
    module = module_of(target, tmp_path, optimizer_state="sharded")

    def spoil(mesh):
        engine = module.build(target.plain(), device="cpu", precision="fp32", mesh=mesh)
        engine.load(initial_weights(target.model, seed=1))
        batch = rows_of(random_batch(target, 3), mesh.get_rank(), 2)
        if mesh.get_rank() == 1:
            batch = batch._replace(mask=batch.mask * float("inf"))
        before = engine.weight.flat.clone()
        result = engine.step(batch, RATE)
        engine.loss(batch)
        return bool(result.applied), torch.equal(engine.weight.flat, before)

    assert run_ranks(2, spoil) == [(False, True), (False, True)]


@pytest.mark.parametrize("architecture", ["qwen3", "tied", "qwen2", "minicpm4"])
def test_tensor_parallel_layers_compute_what_whole_ones_do(architecture, tmp_path):
    target = tiny_target(architecture, recipe=SINGLE, data={"documents": "mask"})
    alone = on_ranks(1, module_of(target, tmp_path), target)
    split = target.model_copy(update={"parallel": Parallel(tensor=2)})
    module = module_of(split, tmp_path)
    found = on_ranks((1, 2), module, split)
    assert_near(found, alone)
    assert_same(on_ranks((1, 2), module, split), found)


@pytest.mark.parametrize("state", SCALE["optimizer_state"][0])
def test_data_and_tensor_ranks_together(state, tmp_path):
    target = tiny_target("qwen3", recipe=SINGLE)
    whole, split = module_of(target, tmp_path), target.model_copy(update={"parallel": Parallel(tensor=2)})
    alone = on_ranks(1, whole, target)
    module = module_of(split, tmp_path, optimizer_state=state)
    found = on_ranks((2, 2), module, split)
    assert_near(found, alone)
    assert_same(on_ranks((2, 2), module, split), found)
    half = on_ranks((2, 2), module, split, last=2)
    rest = on_ranks((2, 2), module, split, first=2, state=half[2])
    assert_same((half[0] + rest[0], *rest[1:]), found)
    assert_near(on_ranks(1, whole, target, first=2, state=half[2]), (alone[0][2:], *alone[1:]))


def test_split_layers_in_bf16_stay_within_its_rounding(tmp_path):
    target = tiny_target(recipe=SINGLE)
    split = target.model_copy(update={"parallel": Parallel(tensor=2)})
    options = {"precision": "bf16", "last": 1}  # later steps start from weights that rounding has moved
    (alone,), *_ = on_ranks(1, module_of(target, tmp_path), target, **options)
    (found,), *_ = on_ranks((1, 2), module_of(split, tmp_path), split, **options)
    assert found[0] == pytest.approx(alone[0], rel=1e-3)
    assert found[1] == pytest.approx(alone[1], rel=1e-2)
