import subprocess

import pytest
import ruff
import torch

from forgetrain.engine.contract import weight_hash
from forgetrain.engine.plan import Plan, choices
from forgetrain.engine.write import load_engine, source_hash, write_engine
from forgetrain.errors import UserError
from forgetrain.numerics.init import initial_weights
from forgetrain.spec.taps import tap_names
from tests.tiny import ARCHITECTURES, random_batch, tiny_target

#: A plan that turns every structural choice away from the default.
FAR = Plan(
    {"token_order": "sequence", "qkv": "grouped", "gate_up": "fused", "norm_order": "megatron", "attention": "megatron"}
)


def engine_of(target, plan, folder, precision="fp32"):
    path = folder / f"{source_hash(write_engine(target, plan))[:8]}.py"
    path.write_text(write_engine(target, plan))
    engine = load_engine(path).build(target.plain(), device="cpu", precision=precision, mesh=None)
    engine.load(initial_weights(target.model, seed=1))
    return engine


@pytest.mark.parametrize("documents", ["ignore", "mask", "mask+reset"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_structure_moves_no_result_beyond_rounding(architecture, documents, tmp_path):
    target = tiny_target(architecture, data={"documents": documents})
    batch = random_batch(target, 3, documents=True)
    plain = engine_of(target, Plan.textbook(), tmp_path)
    far = engine_of(target, FAR, tmp_path)
    expected, found = dict(plain.probe(batch)), dict(far.probe(batch))
    assert list(found) == list(expected) == tap_names(target.model, micro_batches=2)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-5, name
    for engine in (plain, far):
        for _ in range(3):
            result = engine.step(batch, 1e-2)
    assert torch.allclose(plain.step(batch, 1e-2).loss, far.step(batch, 1e-2).loss, rtol=1e-5)
    assert bool(result.applied)


def test_every_choice_is_written_and_runs(tmp_path):
    target = tiny_target("qwen3")
    batch = random_batch(target, 3)
    losses = {}
    for key, options in choices(target).items():
        for name in options:
            engine = engine_of(target, Plan.textbook().with_choice(key, name), tmp_path)
            engine.step(batch, 1e-2)
            losses[key, name] = float(engine.step(batch, 1e-2).loss)
    assert max(losses.values()) - min(losses.values()) < 1e-5


@pytest.mark.parametrize("plan", [Plan.textbook(), FAR], ids=["textbook", "far"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_flat_file_is_formatted_and_names_nothing_of_this_package(architecture, plan):
    source = write_engine(tiny_target(architecture), plan)
    for command in (["format", "--check"], ["check", "--select", "E,F,I,UP,B"]):
        done = subprocess.run(
            [ruff.find_ruff_bin(), *command, "--isolated", "--line-length", "120", "-"],
            input=source,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
    assert "forgetrain." not in source
    assert "{{" not in source


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("plan", [Plan.textbook(), FAR], ids=["textbook", "far"])
def test_restoring_a_state_goes_on_bit_for_bit(plan, precision, tmp_path):
    target = tiny_target("qwen2")
    batches = [random_batch(target, seed) for seed in range(4)]
    whole = engine_of(target, plan, tmp_path, precision)
    for batch in batches:
        whole.step(batch, 1e-2)
    first = engine_of(target, plan, tmp_path, precision)
    for batch in batches[:2]:
        first.step(batch, 1e-2)
    state = {name: shard._replace(tensor=shard.tensor.clone()) for name, shard in first.state().items()}
    second = engine_of(target, plan, tmp_path, precision)
    second.restore(state)
    for batch in batches[2:]:
        second.step(batch, 1e-2)
    assert weight_hash(second.state()) == weight_hash(whole.state())
    assert int(second.state()["step"].tensor) == 4


def test_bf16_masters_start_from_the_rounded_weights(tmp_path):
    target = tiny_target()
    engine = engine_of(target, Plan.textbook(), tmp_path, "bf16")
    weights = initial_weights(target.model, seed=1)
    for name, tensor in weights.items():
        assert torch.equal(engine.state()[f"master/{name}"].tensor, tensor.bfloat16().float())


def test_a_norm_that_is_not_finite_moves_nothing(tmp_path):
    target = tiny_target()
    engine = engine_of(target, Plan.textbook(), tmp_path)
    batch = random_batch(target, 3)
    engine.step(batch, 1e-2)
    before = weight_hash(engine.state())
    result = engine.step(batch._replace(mask=batch.mask * float("nan")), 1e-2)
    assert not bool(result.applied)
    assert weight_hash(engine.state()) == before
    assert int(engine.state()["step"].tensor) == 1


def test_probe_leaves_weights_and_moments_alone(tmp_path):
    target = tiny_target()
    engine = engine_of(target, Plan.textbook(), tmp_path)
    before = weight_hash(engine.state())
    list(engine.probe(random_batch(target, 3)))
    assert weight_hash(engine.state()) == before
    assert not any(shard.tensor.any() for name, shard in engine.state().items() if name.startswith("exp_avg"))


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "engine.py"
    path.write_text(write_engine(tiny_target(), Plan.textbook()))
    with pytest.raises(ValueError, match=r"model.tie_word_embeddings = False, the target has True"):
        load_engine(path).build(tiny_target("tied").plain(), device="cpu", precision="fp32", mesh=None)


@pytest.mark.parametrize(
    ("source", "problem"),
    [("import nothing_of_that_name", "does not import: ModuleNotFoundError"), ("x = 1", "no build function")],
)
def test_a_file_that_is_no_engine_is_refused_by_name(source, problem, tmp_path):
    path = tmp_path / "engine.py"
    path.write_text(source)
    with pytest.raises(UserError, match=problem) as caught:
        load_engine(path)
    assert caught.value.file == path


def test_muon_is_refused_where_layers_are_split():
    target = tiny_target(recipe={"optimizer": "muon"}, parallel={"tensor": 2})
    with pytest.raises(UserError, match="needs whole") as refused:
        write_engine(target, Plan({"schedule": "production"}))
    assert refused.value.key == "parallel.tensor"
