"""Engines of fp8 targets: the hopper schedule's under Triton's interpreter and in torch's formulas, on a GPU in
earnest; the explicit schedule's, which is what they are measured against."""

import functools

import pytest
import torch

from forgetrain.engine.contract import Batch
from forgetrain.engine.plan import HOPPER, Plan
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.errors import UserError
from forgetrain.gates.g4 import ErrorPool, g4
from forgetrain.numerics.init import initial_weights
from forgetrain.numerics.oracle import oracle_step
from tests.engine.test_scale import assert_same, on_ranks
from tests.formulas import in_torch
from tests.tiny import random_batch, tiny_target

pytest.importorskip("triton", reason="Triton is not installed: pip install forgetrain[gpu]")

from tests.interpreter import round_to_nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAN = Plan({"schedule": "hopper"})
SMALL = {"batch_size": 2, "micro_batch_size": 1, "sequence_length": 16}
SMALLEST = {**SMALL, "batch_size": 1}  # for the interpreter, which is slow
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter, and of formulas on a CPU")
round_to_nearest()


def fp8_target(architecture="minicpm5", **sections):
    sections = {"recipe": SMALL, **sections}
    return tiny_target(architecture, precision={"dtype": "fp8"}, **sections)


def built(target, path, plan=PLAN, precision="fp8", change=lambda source: source, device=DEVICE):
    path.write_text(change(write_engine(target, plan)))
    engine = load_engine(path).build(target.plain(), device=device, precision=precision, mesh=None)
    engine.load(initial_weights(target.model, seed=1))
    return engine


def batch_of(target, seed, device=DEVICE):
    return Batch(*(field.to(device) for field in random_batch(target, seed)))


def trained(engine, target, steps, device=DEVICE):
    found = [engine.step(batch_of(target, seed, device), 3e-3) for seed in range(steps)]
    return [(float(r.loss), float(r.grad_norm)) for r in found]


def moments(engine):
    return {name: s.tensor.cpu().double() for name, s in engine.state().items() if name.startswith("exp_avg/")}


def apart(found, wanted):
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}


def pool(engine, target, device=DEVICE):
    """Errors of the clipped gradients of four steps from zero moments, against the oracle."""
    found, batches = ErrorPool(), [batch_of(target, seed, device) for seed in range(4)]
    for seed, batch in enumerate(batches):
        weights = initial_weights(target.model, seed)
        engine.load(weights)
        engine.step(batch, 1e-3)
        truth = oracle_step(target, weights, random_batch(target, seed), 1e-3, precision="bf16").clipped
        mine = {name: moments(engine)[f"exp_avg/{name}"] / (1 - target.recipe.beta1) for name in truth}
        found.add_batch(truth.items(), ((name, value.float()) for name, value in mine.items()))
    return found


@ON_CPU
def test_the_exact_mode_is_that_of_the_bf16_engine_bit_for_bit(tmp_path):
    target = fp8_target(recipe=SMALLEST, model={"num_hidden_layers": 1})
    engines = [
        built(target.for_reference(), tmp_path / "bf16.py", precision="fp32"),
        built(target, tmp_path / "fp8.py", precision="fp32"),
    ]
    results = [trained(engine, target, 2) for engine in engines]
    assert results[0] == results[1]
    states = [engine.state() for engine in engines]
    assert all(torch.equal(shard.tensor, states[1][name].tensor) for name, shard in states[0].items())


@ON_CPU
def test_kernels_and_formulas_train_the_same_engine(tmp_path):
    """Under the interpreter, and with each kernel's formula in torch in its place: sums are ordered otherwise."""
    target = fp8_target("minicpm4", recipe=SMALLEST)
    kernels, formulas = built(target, tmp_path / "a.py"), built(target, tmp_path / "b.py", change=in_torch)
    for found, wanted in zip(trained(kernels, target, 2), trained(formulas, target, 2), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert max(apart(moments(kernels), moments(formulas)).values()) < 1e-3


@ON_CPU
@pytest.mark.parametrize("architecture", ["minicpm5", "minicpm4", "tied"])
def test_its_errors_are_those_of_the_explicit_schedule(architecture, tmp_path):
    """By G4; and not those of bf16."""
    target = fp8_target(architecture)
    mine = pool(built(target, tmp_path / "a.py", change=in_torch), target)
    theirs = pool(built(target, tmp_path / "b.py", Plan.textbook()), target)
    in_bf16 = pool(built(target.for_reference(), tmp_path / "c.py", Plan.textbook(), precision="bf16"), target)
    assert g4(mine, theirs, ratio=1.5).passed
    assert g4(theirs, mine, ratio=1.5).passed
    layers = [kind for kind in mine.kinds if "proj" in kind]
    assert all(mine.kinds[kind].rms > 5 * in_bf16.kinds[kind].rms for kind in layers)


NUMBER = "    number = (x.float() * torch.exp2(power.float())[..., None, None]).to(out.turned.dtype)\n"
DEFECTS = {
    "a head without gradient": (
        "        d_qkv = self.attention_backward(",
        "        d_out[:, 0] = 0\n        d_qkv = self.attention_backward(",
    ),
    "a sixteenth of the tokens without weight gradients": (
        "        fp8_product_(grad, d_y.turned,",
        "        d_y.turned[:, ::16] = 0\n        fp8_product_(grad, d_y.turned,",
    ),
    "numbers above the type's range": ("    power = power.clamp(max=126)\n", "    power = power.clamp(max=126) + 1\n"),
    "numbers cut off, not rounded": (
        NUMBER,
        "    wide = (x.float() * torch.exp2(power.float())[..., None, None]).view(torch.int32)\n"
        "    kept = wide & -(1 << (20 if out.turned.dtype == E4M3 else 21))\n"
        "    number = kept.view(torch.float32).to(out.turned.dtype)\n",
    ),
    "another layer's turned weight": ("stack.turned[int(i)]", "stack.turned[0]"),
}


@ON_CPU
@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_err_more(defect, tmp_path):
    target, (old, new) = fp8_target(), DEFECTS[defect]

    def planted(source):
        assert old in in_torch(source)
        return in_torch(source).replace(old, new)

    theirs = pool(built(target, tmp_path / "b.py", Plan.textbook()), target)
    assert not g4(pool(built(target, tmp_path / "a.py", change=planted), target), theirs, ratio=1.5).passed


@ON_CPU
def test_it_learns_and_goes_on_bit_for_bit_from_a_state(tmp_path):
    target = fp8_target()
    whole, first = (built(target, tmp_path / f"{name}.py", change=in_torch) for name in "ab")
    step = functools.partial(batch_of, target, 0)
    losses = [float(whole.step(step(), 3e-3).loss) for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5
    for _ in range(7):
        first.step(step(), 3e-3)
    state = {name: shard._replace(tensor=shard.tensor.clone()) for name, shard in first.state().items()}
    resumed = built(target, tmp_path / "c.py", change=in_torch)
    resumed.restore(state)
    assert [float(resumed.step(step(), 3e-3).loss) for _ in range(5)] == losses[7:]
    assert float(resumed.loss(step())) == float(whole.loss(step()))


@ON_CPU
def test_a_norm_that_is_not_finite_moves_nothing(tmp_path):
    target = fp8_target()
    engine = built(target, tmp_path / "a.py", change=in_torch)
    weights = initial_weights(target.model, seed=1)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.inf
    engine.load(weights)
    before = engine.master.clone()
    assert not bool(engine.step(batch_of(target, 3), 1e-2).applied)
    assert torch.equal(engine.master, before)


@ON_CPU
def test_sharded_states_are_the_replicated_ones(tmp_path):
    target, modules = fp8_target(), []
    for states in ("sharded", "replicated"):
        path = tmp_path / f"{states}.py"
        path.write_text(in_torch(write_engine(target, PLAN.with_choice("optimizer_state", states))))
        modules.append(load_engine(path))
    assert_same(*(on_ranks(1, module, target, last=2) for module in modules))


def test_the_file_imports_torch_and_triton_alone():
    source = write_engine(fp8_target(), PLAN)
    roots = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert roots == {"__future__", "collections", "ctypes", "functools", "typing", "torch", "triton"}
    assert max(map(len, source.splitlines())) <= 120


@pytest.mark.parametrize(
    ("sections", "plan", "key"),
    [
        ({}, Plan({"schedule": "production"}), "precision.dtype"),
        ({}, Plan({"schedule": "fsdp"}), "precision.dtype"),
        ({}, PLAN.with_choice("swiglu_library", "quack"), "swiglu_library"),
        ({"model": {"intermediate_size": 72}}, PLAN, "model.intermediate_size"),
        ({"recipe": {**SMALL, "sequence_length": 24}}, PLAN, "recipe.micro_batch_size * sequence_length"),
    ],
)
def test_what_has_no_fp8_is_refused_before_anything_is_written(sections, plan, key):
    with pytest.raises(UserError, match="fp8") as refused:
        write_engine(fp8_target(**sections), plan)
    assert refused.value.key == key


@ON_CPU
def test_an_engine_computes_in_its_own_precision_alone(tmp_path):
    target = fp8_target()
    with pytest.raises(ValueError, match="fp32 and fp8, not in bf16"):
        built(target, tmp_path / "a.py", precision="bf16")
    with pytest.raises(ValueError, match="fp32 and bf16, not in fp8"):
        built(target.for_reference(), tmp_path / "b.py", precision="fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("library", HOPPER["attention_library"][0])
@pytest.mark.parametrize("weight_gradients", HOPPER["weight_gradients"][0])
@pytest.mark.parametrize("architecture", ["minicpm5", "minicpm4"])
def test_on_the_gpu_it_errs_as_formulas_on_a_cpu_do(architecture, weight_gradients, library, tmp_path):
    """cuBLASLt's fp8 products, CUDA graphs, cuDNN or FlashAttention-4."""
    if library == "flash4":
        pytest.importorskip("flash_attn.cute", reason="not installed: pip install forgetrain[hopper]")
    target = fp8_target(architecture, model={"head_dim": 64, "num_hidden_layers": 4})
    plan = PLAN.with_choice("attention_library", library).with_choice("weight_gradients", weight_gradients)
    engine = built(target, tmp_path / "a.py", plan)
    formulas = built(target, tmp_path / "b.py", change=in_torch, device="cpu")
    verdict = g4(pool(engine, target), pool(formulas, target, "cpu"), ratio=1.5)
    assert verdict.passed, verdict
    engine.release()
    assert trained(engine, target, 1)[0] == pytest.approx(trained(formulas, target, 1, "cpu")[0], rel=2e-2)
