"""The production schedule against the explicit one, which the oracle and the references hold."""

import pytest
import torch

from forgetrain.engine.plan import WITHOUT_NATIVE, Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.errors import UserError
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.moments import state_shapes
from tests.tiny import ARCHITECTURES, random_batch, tiny_target

PRODUCTION = Plan(
    {
        "schedule": "production",
        "attention_block": "64",
        "head_rows": "256",
        "rope_tables": "fp32",
    }
)


@pytest.fixture
def eager():
    """Regions of torch's run uncompiled: what is tested is the arithmetic, and compiling takes a second for each."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def engine_of(target, plan, folder, precision="fp32"):
    path = folder / f"{plan['schedule']}.py"
    path.write_text(write_engine(target, plan))
    engine = load_engine(path).build(target.plain(), device="cpu", precision=precision, mesh=None)
    engine.load(initial_weights(target.model, seed=1))
    return engine


def worst_difference(target, folder, precision="fp32", plan=PRODUCTION):
    """The largest relative difference of any gradient, read from the moments after one step from zero."""
    batch = random_batch(target, 3, documents=True)
    states = []
    for each in (Plan.textbook(), plan):
        engine = engine_of(target, each, folder, precision)
        losses = [float(engine.step(batch, 1e-2).loss), float(engine.loss(batch))]
        states.append((losses, engine.state()))
    (expected_losses, expected), (losses, found) = states
    assert losses == pytest.approx(expected_losses, rel=1e-5 if precision == "fp32" else 1e-3)
    assert set(found) == set(expected)
    gradients = [name for name in expected if name.startswith("exp_avg/")]
    return max(
        float((found[name].tensor - expected[name].tensor).norm() / expected[name].tensor.norm()) for name in gradients
    )


@pytest.mark.parametrize("documents", ["ignore", "mask", "mask+reset"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_explicit_schedules(architecture, documents, tmp_path):
    assert worst_difference(tiny_target(architecture, data={"documents": documents}), tmp_path) < 1e-5


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("key", "name"),
    [("products", "onednn"), ("products", "torch"), ("attention_kernel", "blocked"), ("regions", "compiled")],
)
@pytest.mark.parametrize("documents", ["ignore", "mask"])
def test_what_torch_has_itself(documents, key, name, tmp_path):
    target = tiny_target("qwen3", data={"documents": documents})
    assert worst_difference(target, tmp_path, plan=PRODUCTION.with_choice(key, name)) < 1e-5


@pytest.mark.parametrize("documents", ["ignore", "mask"])
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 1, 16), (6, 2, 32), (2, 2, 6)])
def test_the_native_kernel_of_other_sizes(heads, groups, size, documents, tmp_path):
    """Rows of 45 positions: neither its tiles nor its spans divide them, and pairs of keys leave one over."""
    model = {"num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": size}
    recipe = {"sequence_length": 45, "batch_size": 2, "micro_batch_size": 2}
    target = tiny_target(model={**model, "max_position_embeddings": 64}, recipe=recipe, data={"documents": documents})
    for precision, limit in (("fp32", 1e-5), ("bf16", 3e-2)):
        assert worst_difference(target, tmp_path, precision) < limit


def test_native_kernels_are_for_cpus():
    target = tiny_target(hardware={"name": "h200"})
    plan = PRODUCTION
    for key, other in WITHOUT_NATIVE.items():
        with pytest.raises(UserError, match=f'^{key}: .*Choose {key} = "{other}"'):
            write_engine(target, plan)
        plan = plan.with_choice(key, other)
    assert write_engine(target, plan)


@pytest.mark.parametrize("architecture", ["minicpm5", "qwen3"])
def test_blocks_that_do_not_divide_the_sequence(architecture, tmp_path):
    target = tiny_target(
        architecture,
        model={"max_position_embeddings": 128},
        recipe={"sequence_length": 72, "batch_size": 4, "micro_batch_size": 4},  # blocks of 64, slices of 256 tokens
    )
    assert worst_difference(target, tmp_path) < 1e-5


def test_bf16_stays_within_its_rounding(tmp_path):
    assert worst_difference(tiny_target(), tmp_path, "bf16") < 3e-2


@pytest.mark.parametrize(("architecture", "precision", "near"), [("qwen2", "fp32", 1e-5), ("tied", "bf16", 3e-2)])
def test_muon_steps_the_layers_matrices_as_the_explicit_schedule_does(architecture, precision, near, tmp_path):
    target = tiny_target(architecture, recipe={"optimizer": "muon"})
    assert worst_difference(target, tmp_path, precision) < near
    start, batch = initial_weights(target.model, seed=1), random_batch(target, 3)
    states = []
    for plan in (Plan.textbook(), PRODUCTION):
        engine = engine_of(target, plan, tmp_path, precision)
        engine.step(batch, 1e-2)
        states.append(engine.state())
    expected, found = states
    assert set(found) == set(state_shapes(target))
    for name, weight in start.items():
        moved = expected[f"master/{name}"].tensor - weight
        assert float((found[f"master/{name}"].tensor - weight - moved).norm() / moved.norm()) < 30 * near, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_restoring_a_state_goes_on_bit_for_bit(optimizer, tmp_path):
    target = tiny_target(recipe={"optimizer": optimizer})
    whole, first = (engine_of(target, PRODUCTION, tmp_path) for _ in range(2))
    batches = [random_batch(target, seed) for seed in range(4)]
    for batch in batches:
        whole.step(batch, 1e-2)
    for batch in batches[:2]:
        first.step(batch, 1e-2)
    second = engine_of(target, PRODUCTION, tmp_path)
    second.restore(first.state())
    for batch in batches[2:]:
        second.step(batch, 1e-2)
    for name, shard in whole.state().items():
        assert torch.equal(second.state()[name].tensor, shard.tensor), name


def test_a_norm_that_is_not_finite_moves_nothing(tmp_path):
    target = tiny_target()
    engine = engine_of(target, PRODUCTION, tmp_path)
    before = engine.master.clone()
    batch = random_batch(target, 3)
    result = engine.step(batch._replace(mask=batch.mask * float("inf")), 1e-2)
    assert not bool(result.applied)
    assert torch.equal(engine.master, before)


@pytest.mark.slow
def test_compiled_regions_compute_the_same(tmp_path):
    assert worst_difference(tiny_target("qwen3"), tmp_path) < 1e-5
