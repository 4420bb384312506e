"""The hopper schedule against the float64 oracle: in fp32 under Triton's interpreter, on a GPU in both dtypes."""

import json
import sys
from pathlib import Path

import pytest
import torch

from forgetrain.engine.contract import Batch, make_batch
from forgetrain.engine.plan import HOPPER, SCALE, Plan
from forgetrain.engine.write import load_engine, source_hash, write_engine
from forgetrain.errors import UserError
from forgetrain.numerics.init import initial_weights
from forgetrain.numerics.oracle import oracle_step
from forgetrain.spec.target import load_target
from tests.engine.ranks import run_ranks
from tests.engine.test_scale import assert_near, assert_same, on_ranks
from tests.tiny import random_batch, tiny_target

pytest.importorskip("triton", reason="Triton is not installed: pip install forgetrain[gpu]")

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAN = Plan({"schedule": "hopper"})
FAST = Plan({"schedule": "hopper", "attention_library": "flash4", "swiglu_library": "quack"})
ARCHITECTURES = ["minicpm5", "tied", "mha", "minicpm4"]
INTERPRETED = pytest.mark.skipif(DEVICE == "cuda", reason="ranks on a CPU run the kernels under the interpreter")
SMALL = {"batch_size": 2, "micro_batch_size": 1, "sequence_length": 8}  # the interpreter is slow


def engine_of(target, folder, precision="fp32", plan=PLAN):
    path = folder / "hopper.py"
    path.write_text(write_engine(target, plan))
    engine = load_engine(path).build(target.plain(), device=DEVICE, precision=precision, mesh=None)
    engine.load(initial_weights(target.model, seed=1))
    return engine


def batch_of(target, seed):
    return Batch(*(field.to(DEVICE) for field in random_batch(target, seed)))


def errors(target, folder, precision, plan=PLAN):
    """Relative error of the loss, and the worst of any gradient and any weight, after one step from zero moments."""
    weights = initial_weights(target.model, seed=1)
    batch = random_batch(target, 3, documents=target.data.documents != "ignore")
    truth = oracle_step(target, weights, batch, 1e-2, precision=precision)
    engine = engine_of(target, folder, precision, plan)
    batch = Batch(*(field.to(DEVICE) for field in batch))
    evaluated = float(engine.loss(batch))
    result, state = engine.step(batch, 1e-2), engine.state()
    assert bool(result.applied)
    assert int(state["step"].tensor) == 1
    assert evaluated == pytest.approx(float(result.loss), rel=1e-5)
    norm = float((result.grad_norm.double().cpu() - truth.grad_norm).abs() / truth.grad_norm)

    def worst(kind, wanted, factor):
        found = {name: state[f"{kind}/{name}"].tensor.cpu().double() * factor for name in wanted}
        return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)

    gradient = worst("exp_avg", truth.clipped, 1 / (1 - target.recipe.beta1))
    return abs(float(result.loss) - float(truth.loss)), norm, gradient, worst("master", truth.master, 1.0)


@pytest.mark.parametrize(
    ("architecture", "plan"), [*((each, PLAN) for each in ARCHITECTURES), ("minicpm5", FAST), ("minicpm4", FAST)]
)
def test_one_step_is_the_oracles_in_fp32(architecture, plan, tmp_path):
    target = tiny_target(architecture, recipe=SMALL)
    loss, norm, gradient, weight = errors(target, tmp_path, "fp32", plan)
    assert loss < 1e-5
    assert norm < 1e-5
    assert gradient < 1e-5
    assert weight < 1e-4


@pytest.mark.parametrize("documents", ["mask", "mask+reset"])
def test_documents_are_parted_as_the_oracle_parts_them(documents, tmp_path):
    target = tiny_target(recipe=SMALL, data={"documents": documents})
    loss, norm, gradient, weight = errors(target, tmp_path, "fp32", FAST)
    assert loss < 1e-5
    assert norm < 1e-5
    assert gradient < 1e-5
    assert weight < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("documents", ["mask", "mask+reset"])
def test_documents_are_parted_in_bf16(documents, tmp_path):
    pytest.importorskip("flash_attn.cute", reason="not installed: pip install forgetrain[hopper]")
    target = tiny_target(model={"head_dim": 64}, data={"documents": documents})
    loss, norm, gradient, _ = errors(target, tmp_path, "bf16", FAST)
    assert loss < 2e-2
    assert norm < 2e-2
    assert gradient < 5e-2


@pytest.mark.gpu
@pytest.mark.parametrize("weight_gradients", HOPPER["weight_gradients"][0])
@pytest.mark.parametrize("plan", [PLAN, FAST], ids=["torch", "flash4-quack"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_step_is_near_the_oracles_in_bf16(architecture, plan, weight_gradients, tmp_path):
    if plan == FAST:
        pytest.importorskip("flash_attn.cute", reason="not installed: pip install forgetrain[hopper]")
    target = tiny_target(architecture, model={"head_dim": 64})
    plan = plan.with_choice("weight_gradients", weight_gradients)
    loss, norm, gradient, _ = errors(target, tmp_path, "bf16", plan)
    assert loss < 2e-2
    assert norm < 2e-2
    assert gradient < 5e-2


def test_restoring_a_state_goes_on_bit_for_bit(tmp_path):
    target = tiny_target(recipe=SMALL, model={"num_hidden_layers": 1})
    whole, first = (engine_of(target, tmp_path) for _ in range(2))
    whole.step(batch_of(target, 1), 1e-2)
    first.step(batch_of(target, 1), 1e-2)
    second = engine_of(target, tmp_path)
    second.restore({name: shard._replace(tensor=shard.tensor.clone()) for name, shard in first.state().items()})
    for engine in (whole, second):
        engine.step(batch_of(target, 2), 1e-2)
    for name, shard in whole.state().items():
        assert torch.equal(second.state()[name].tensor, shard.tensor), name


@INTERPRETED
@pytest.mark.parametrize("plan", [PLAN, FAST], ids=["torch", "flash4-quack"])
def test_sharded_states_are_the_replicated_ones(plan, tmp_path):
    """On one rank bit for bit; on two, what a sum's order leaves."""
    target = tiny_target(recipe=SMALL, model={"num_hidden_layers": 1})
    modules = {}
    for states in SCALE["optimizer_state"][0]:
        path = tmp_path / f"{states}.py"
        path.write_text(write_engine(target, plan.with_choice("optimizer_state", states)))
        modules[states] = load_engine(path)
    alone = {states: on_ranks(1, module, target, last=2) for states, module in modules.items()}
    assert_same(alone["sharded"], alone["replicated"])
    both = {states: on_ranks(2, module, target, last=2) for states, module in modules.items()}
    assert_near(both["replicated"], alone["replicated"])
    assert_near(both["sharded"], both["replicated"], 1e-6)
    _, _, middle = on_ranks(2, modules["sharded"], target, last=1)
    (_, later), *rest = alone["sharded"]
    assert_near(on_ranks(1, modules["sharded"], target, first=1, last=2, state=middle), ([later], *rest))


@INTERPRETED
def test_every_rank_keeps_its_part_of_the_states_alone(tmp_path):
    target = tiny_target(recipe=SMALL, model={"num_hidden_layers": 1})
    path = tmp_path / "engine.py"
    path.write_text(write_engine(target, PLAN))
    module = load_engine(path)

    def kept(mesh):
        engine = module.build(target.plain(), device="cpu", precision="fp32", mesh=mesh)
        return sum(flat.numel() for flat in engine.states().values())

    sizes = run_ranks(2, kept)
    assert sum(sizes) == 3 * sum(torch.Size(shape).numel() for shape in target.model.parameter_shapes().values())
    assert max(sizes) < 1.1 * min(sizes)


def test_a_norm_that_is_not_finite_moves_nothing(tmp_path):
    target = tiny_target(recipe=SMALL)
    engine, batch = engine_of(target, tmp_path), batch_of(target, 3)
    before = engine.master.clone()
    result = engine.step(batch._replace(mask=batch.mask * float("inf")), 1e-2)
    assert not bool(result.applied)
    assert torch.equal(engine.master, before)
    assert bool(engine.step(batch, 1e-2).applied)


def test_there_is_room_for_as_many_documents_as_there_are(tmp_path):
    """Each token of a micro-batch is one, where the fixed number is 64 else."""
    length = 128
    recipe, model = {**SMALL, "sequence_length": length}, {"max_position_embeddings": length}
    target = tiny_target(data={"documents": "mask"}, recipe=recipe, model=model)
    engine = engine_of(target, tmp_path, plan=FAST)
    tokens = torch.zeros(2, length, dtype=torch.int64, device=DEVICE)
    few, many = (torch.arange(0, 2 * length, step, device=DEVICE) for step in (40, 1))
    batch = make_batch(tokens, tokens, None, few)
    assert engine.room(batch) == 64
    micro = engine.fill(batch, slice(1, 2), (1, length, 64))
    assert micro.documents[:6].tolist() == [0, 32, 72, 112, 128, 128]
    assert micro.documents[6:].eq(length).all()
    assert micro.first[30:34].tolist() == [0, 0, 32, 32]
    batch = make_batch(tokens, tokens, None, many)
    assert engine.room(batch) == length
    micro = engine.fill(batch, slice(1, 2), (1, length, length))
    assert micro.documents.tolist() == list(range(length + 1))
    assert micro.first.tolist() == list(range(length))
    assert engine.room(make_batch(tokens, tokens, None, few)) == length


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        ("data", {"documents": "mask"}, "data.documents"),
        ("model", {"qk_norm": True}, "model.qk_norm"),
        ("model", {"attention_bias": True}, "model.attention_bias"),
        ("recipe", {"optimizer": "muon"}, "recipe.optimizer"),
    ],
)
def test_what_has_no_kernel_is_refused_before_anything_is_written(section, values, key):
    with pytest.raises(UserError, match="hopper schedule") as refused:
        write_engine(tiny_target(**{section: values}), PLAN)
    assert refused.value.key == key


@pytest.mark.gpu
@pytest.mark.parametrize("weight_gradients", HOPPER["weight_gradients"][0])
def test_memory_given_back_is_captured_anew(weight_gradients, tmp_path):
    target = tiny_target()
    plan = PLAN.with_choice("weight_gradients", weight_gradients)
    engine, other = (engine_of(target, tmp_path, "bf16", plan) for _ in range(2))
    for seed in range(3):
        found, expected = (e.step(batch_of(target, seed), 1e-3) for e in (engine, other))
        assert float(found.loss) == pytest.approx(float(expected.loss), rel=1e-3)
        engine.release()


def test_the_file_imports_torch_and_triton_alone():
    source = write_engine(tiny_target(), PLAN)
    roots = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert roots == {"__future__", "collections", "ctypes", "functools", "typing", "torch", "triton"}
    assert max(map(len, source.splitlines())) <= 120


@pytest.mark.parametrize(
    ("key", "choice", "missing"),
    [("attention_library", "flash4", "flash_attn.cute.interface"), ("swiglu_library", "quack", "quack.gemm_config")],
)
def test_a_package_that_is_missing_is_named_before_anything_is_compiled(key, choice, missing, tmp_path, monkeypatch):
    target, path = tiny_target(), tmp_path / "hopper.py"
    path.write_text(write_engine(target, PLAN.with_choice(key, choice)))
    module = load_engine(path)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ValueError, match=r"pip install 'forgetrain\[hopper\]'"):
        module.build(target.plain(), device="cuda", precision="bf16", mesh=None)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_cpu_without_the_interpreter_is_told_so(tmp_path, monkeypatch):
    target, path = tiny_target(), tmp_path / "hopper.py"
    path.write_text(write_engine(target, PLAN))
    module = load_engine(path)
    monkeypatch.delenv("TRITON_INTERPRET")
    for device, reason in (("cpu", "TRITON_INTERPRET"), ("cuda", "CUDA build")):
        with pytest.raises(ValueError, match=reason):
            module.build(target.plain(), device=device, precision="fp32", mesh=None)


def test_a_plan_of_this_schedule_holds_its_own_choices_alone():
    plan = PLAN.with_choice("rank_head_forward", "3").with_choice("attention_block", "64")
    assert [key for key, _ in plan.items()] == ["schedule", *SCALE, *HOPPER]
    assert not set(HOPPER) & {key for key, _ in Plan.textbook().items()}


@pytest.mark.parametrize("kind", ["", "-fp8"])
@pytest.mark.parametrize("model", ["minicpm5-1b", "minicpm4-0.5b"])
def test_an_engine_that_ships_is_the_one_that_was_measured(model, kind):
    name = f"{model}-h200{kind}"
    folder = ROOT / "engines" / name
    provenance = json.loads((folder / "provenance.json").read_text())
    measured = json.loads((folder / "measurements" / "against-megatron-8x4.json").read_text())
    assert source_hash((folder / "engine.py").read_text()) == provenance["sha256"] == measured["engine_sha256"]
    target = load_target(ROOT / "targets" / f"{name}.toml").plain()
    assert (provenance["target"]["model"], provenance["target"]["precision"]) == (target["model"], target["precision"])
    assert Plan.read(folder / "plan.toml")["schedule"] == "hopper"
