"""The fsdp schedule against the explicit one, and on several ranks against itself on one."""

from functools import partial

import pytest
import torch

from forgetrain.engine.plan import FSDP, Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.errors import UserError
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.parallel import Parallel
from tests.engine.ranks import run_ranks
from tests.engine.test_production import engine_of, worst_difference
from tests.engine.test_scale import RATE, SINGLE, assert_near, assert_same, on_ranks, rows_of, take_steps_on
from tests.tiny import ARCHITECTURES, random_batch, tiny_target

PLAN = Plan({"schedule": "fsdp"})


def module_of(target, folder, plan=PLAN):
    path = folder / f"{plan['schedule']}.py"
    path.write_text(write_engine(target, plan))
    return load_engine(path)


def assert_same_course(found, expected, tolerance=1e-5):
    """Losses and gradient norms of every step. Weights are left out: where a gradient is rounding alone, AdamW makes a
    whole step of it."""
    for one, other in zip(found[0], expected[0], strict=True):
        assert one == pytest.approx(other, rel=tolerance)
    assert found[1] == pytest.approx(expected[1], rel=tolerance)


@pytest.mark.parametrize("documents", ["ignore", "mask", "mask+reset"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_explicit_schedules(architecture, documents, tmp_path):
    target = tiny_target(architecture, data={"documents": documents})
    assert worst_difference(target, tmp_path, plan=PLAN) < 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "tied"])
def test_bf16_stays_within_its_rounding(architecture, tmp_path):
    assert worst_difference(tiny_target(architecture), tmp_path, "bf16", PLAN) < 3e-2


def test_recomputing_changes_no_bit(tmp_path):
    target = tiny_target()
    kept = on_ranks(1, module_of(target, tmp_path, PLAN.with_choice("recompute", "none")), target)
    assert_same(on_ranks(1, module_of(target, tmp_path), target), kept)


def test_a_norm_that_is_not_finite_moves_nothing(tmp_path):
    target = tiny_target()
    engine, batch = engine_of(target, PLAN, tmp_path), random_batch(target, 3)
    before = {name: shard.tensor.clone() for name, shard in engine.state().items()}
    result = engine.step(batch._replace(mask=batch.mask * float("inf")), RATE)
    assert not bool(result.applied)
    assert all(torch.equal(shard.tensor, before[name]) for name, shard in engine.state().items())
    assert bool(engine.step(batch, RATE).applied)
    assert int(engine.state()["step"].tensor) == 1


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["qwen3", "tied"])
def test_several_ranks_compute_what_one_does(architecture, tmp_path):
    target = tiny_target(architecture, recipe=SINGLE, data={"documents": "mask+reset"})
    explicit = on_ranks(1, module_of(target, tmp_path, Plan.textbook()), target)
    module = module_of(target, tmp_path)
    alone, both = on_ranks(1, module, target), on_ranks(2, module, target)
    assert_same_course(alone, explicit)
    assert_near(both, alone)
    assert_near(on_ranks(4, module, target), alone)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", FSDP["gradients"][0])
def test_bf16_on_two_ranks_is_near_one(gradients, tmp_path):
    target = tiny_target("qwen3", recipe=SINGLE)
    module = module_of(target, tmp_path, PLAN.with_choice("gradients", gradients))
    alone, both = (on_ranks(ranks, module, target, precision="bf16") for ranks in (1, 2))
    assert_same_course(both, alone, 2e-2)
    assert_same(on_ranks(2, module, target, precision="bf16"), both)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_on_other_numbers_of_ranks(tmp_path):
    target = tiny_target(recipe=SINGLE)
    module = module_of(target, tmp_path)
    whole, half = on_ranks(2, module, target), on_ranks(2, module, target, last=2)
    rest = on_ranks(2, module, target, first=2, state=half[2])
    assert_same((half[0] + rest[0], *rest[1:]), whole)
    state, results = None, []
    for step, ranks in enumerate((2, 1, 4, 2)):
        part = on_ranks(ranks, module, target, first=step, last=step + 1, state=state)
        state, results = part[2], results + part[0]
    assert_same_course((results, part[1]), whole)


@pytest.mark.slow
def test_every_rank_keeps_its_rows_alone_also_between_steps_and_evaluations(tmp_path):
    target = tiny_target(recipe=SINGLE)
    module = module_of(target, tmp_path)
    whole = sum(torch.Size(shape).numel() for shape in target.model.parameter_shapes().values())
    answers = run_ranks(4, partial(take_steps_on, module, target, {"last": 1}))
    kept = [sum(shard.tensor.numel() for shard in state.values()) - 1 for _, _, state in answers]
    assert kept == [3 * whole // 4] * 4

    def gathered(mesh):
        engine = module.build(target.plain(), device="cpu", precision="fp32", mesh=mesh)
        engine.load(initial_weights(target.model, seed=1))
        engine.loss(random_batch(target, 1))
        engine.step(rows_of(random_batch(target, 1), mesh.get_rank(), 2), RATE)
        return [name for name, p in engine.model.named_parameters() if p is not engine.parameters[name]]

    assert run_ranks(2, gathered) == [[], []]


@pytest.mark.slow
def test_fewer_rows_than_ranks(tmp_path):
    """Heads of two elements: two of four ranks hold nothing of the norms of queries and keys."""
    target = tiny_target("qwen3", recipe=SINGLE, model={"head_dim": 2})
    module = module_of(target, tmp_path)
    assert_near(on_ranks(4, module, target), on_ranks(1, module, target))


def test_what_it_does_not_have_is_refused_before_anything_is_written():
    with pytest.raises(UserError, match=r"recipe\.optimizer: the fsdp schedule shards the matrices that Muon needs"):
        write_engine(tiny_target(recipe={"optimizer": "muon"}), PLAN)
    split = tiny_target().model_copy(update={"parallel": Parallel(tensor=2)})
    with pytest.raises(UserError, match=r"parallel\.tensor: the fsdp schedule computes whole layers"):
        write_engine(split, PLAN)


def test_a_plan_of_this_schedule_holds_its_own_choices_alone():
    assert [key for key, _ in PLAN.with_choice("attention_block", "64").items()] == ["schedule", *FSDP]
    assert not set(FSDP) & {key for key, _ in Plan.textbook().items()}


def test_the_file_imports_torch_alone():
    source = write_engine(tiny_target(), PLAN)
    roots = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert roots == {"__future__", "collections", "typing", "torch"}
    assert max(map(len, source.splitlines())) <= 120
