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
SCALINGS = ["tensor", "block"]
#: More than a block of each size, the last of them cut.
WIDE = {
    "model": {"hidden_size": 144, "intermediate_size": 272, "max_position_embeddings": 256},
    "recipe": {**SMALL, "sequence_length": 144},
}
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter, and of formulas on a CPU")
round_to_nearest()


def fp8_target(architecture="minicpm5", scaling="tensor", **sections):
    sections = {**(WIDE if scaling == "block" else {"recipe": SMALL}), **sections}
    return tiny_target(architecture, precision={"dtype": "fp8", "scaling": scaling}, **sections)


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
@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_exact_mode_is_that_of_the_bf16_engine_bit_for_bit(scaling, tmp_path):
    target = fp8_target(scaling=scaling, recipe=SMALLEST, model={"num_hidden_layers": 1})
    engines = [
        built(target.for_reference(), tmp_path / "bf16.py", precision="fp32"),
        built(target, tmp_path / "fp8.py", precision="fp32"),
    ]
    results = [trained(engine, target, 2) for engine in engines]
    assert results[0] == results[1]
    states = [engine.state() for engine in engines]
    assert all(torch.equal(shard.tensor, states[1][name].tensor) for name, shard in states[0].items())


@ON_CPU
@pytest.mark.parametrize("scaling", SCALINGS)
def test_kernels_and_formulas_train_the_same_engine(scaling, tmp_path):
    """Under the interpreter, and with each kernel's formula in torch in its place: sums are ordered otherwise."""
    wide = {"model": {**WIDE["model"], "num_hidden_layers": 1}} if scaling == "block" else {}
    target = fp8_target("minicpm4", scaling, recipe=SMALLEST, **wide)
    kernels, formulas = built(target, tmp_path / "a.py"), built(target, tmp_path / "b.py", change=in_torch)
    for found, wanted in zip(trained(kernels, target, 2), trained(formulas, target, 2), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    assert max(apart(moments(kernels), moments(formulas)).values()) < 1e-3


@ON_CPU
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("architecture", ["minicpm5", "minicpm4", "tied"])
def test_its_errors_are_those_of_the_explicit_schedule(architecture, scaling, tmp_path):
    """By G4; and not those of bf16."""
    target = fp8_target(architecture, scaling)
    mine = pool(built(target, tmp_path / "a.py", change=in_torch), target)
    theirs = pool(built(target, tmp_path / "b.py", Plan.textbook()), target)
    in_bf16 = pool(built(target.for_reference(), tmp_path / "c.py", Plan.textbook(), precision="bf16"), target)
    assert g4(mine, theirs, ratio=1.5).passed
    assert g4(theirs, mine, ratio=1.5).passed
    layers = [kind for kind in mine.kinds if "proj" in kind]
    assert all(mine.kinds[kind].rms > 5 * in_bf16.kinds[kind].rms for kind in layers)


DEFECTS = {
    "a head without gradient": (
        "        d_qkv = self.attention_backward(",
        "        d_out[:, 0] = 0\n        d_qkv = self.attention_backward(",
    ),
    "a sixteenth of the tokens without weight gradients": (
        "        turned = ((y.turned,",
        "        d_y.turned[:, ::16] = 0\n        turned = ((y.turned,",
    ),
    "numbers above the type's range": (".clamp(max=126).float()\n", ".clamp(max=126).float() + 1\n"),
    "numbers cut off, not rounded": (
        "    return x.to(dtype)\n",
        "    kept = x.contiguous().view(torch.int32) & -(1 << (20 if dtype == E4M3 else 21))\n"
        "    return kept.view(torch.float32).to(dtype)\n",
    ),
    "another layer's turned weight": ("self.turned[i]", "self.turned[0]"),
}
SPANS = "    return Fp8(rows[0], turned[0], unit[0].t(), turned_unit[0].t(), SPANS)\n"
BLOCK_DEFECTS = {
    "units of the operand before": (
        SPANS,
        "    before = BEFORE.get(x.shape, (unit, turned_unit))\n"
        "    BEFORE[x.shape] = unit, turned_unit\n"
        "    return Fp8(rows[0], turned[0], before[0][0].t(), before[1][0].t(), SPANS)\n",
    ),
    "blocks scaled as those of the operand before": (
        "    number = nearest(blocks * scale, E4M3)",
        "    key = (*x.shape, high)\n"
        "    before = BEFORE.get(key, (scale, unit))\n"
        "    BEFORE[key] = scale, unit\n"
        "    scale, unit = before\n"
        "    number = nearest((blocks * scale).clamp(-448, 448), E4M3)",
    ),
    "units by rows, not by columns": (
        SPANS,
        "    by_rows = (u[0].reshape(u.shape[2], -1) for u in (unit, turned_unit))\n"
        "    return Fp8(rows[0], turned[0], *by_rows, SPANS)\n",
    ),
    "blocks along rows, units along columns": (
        SPANS,
        "    return Fp8(rows[0], rows[0].t().contiguous(), unit[0].t(), turned_unit[0].t(), SPANS)\n",
    ),
}
PLANTED = [("tensor", defect) for defect in DEFECTS] + [("block", defect) for defect in DEFECTS | BLOCK_DEFECTS]


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    """Errors of the explicit schedule's engine, by scaling."""
    folder, found = tmp_path_factory.mktemp("explicit"), {}
    for scaling in SCALINGS:
        target = fp8_target(scaling=scaling)
        found[scaling] = pool(built(target, folder / f"{scaling}.py", Plan.textbook()), target)
    return found


def planted(defect, source):
    """The source in torch, with this defect."""
    old, new = (DEFECTS | BLOCK_DEFECTS)[defect]
    assert old in in_torch(source)
    return in_torch(source).replace(old, new) + "\nBEFORE = {}\n"


@ON_CPU
@pytest.mark.parametrize(("scaling", "defect"), PLANTED)
def test_planted_defects_err_more(scaling, defect, measures, tmp_path):
    target = fp8_target(scaling=scaling)
    engine = built(target, tmp_path / "a.py", change=functools.partial(planted, defect))
    assert not g4(pool(engine, target), measures[scaling], ratio=1.5).passed


@ON_CPU
@pytest.mark.parametrize("scaling", SCALINGS)
def test_it_learns_and_goes_on_bit_for_bit_from_a_state(scaling, tmp_path):
    target = fp8_target(scaling=scaling)
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
@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_norm_that_is_not_finite_moves_nothing(scaling, tmp_path):
    target = fp8_target(scaling=scaling)
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


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_file_imports_torch_and_triton_alone(scaling):
    source = write_engine(fp8_target(scaling=scaling), PLAN)
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


@ON_CPU
@pytest.mark.parametrize(
    ("version", "precision", "message"), [("12.8", "fp8", "12.9"), ("12.8", "fp32", None), ("12.9", "fp8", None)]
)
def test_a_library_without_blocks_is_one_line(version, precision, message, tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(write_engine(fp8_target(scaling="block"), PLAN))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.version, "cuda", version)
    check = functools.partial(load_engine(tmp_path / "a.py").check_device, torch.device("cuda"), precision)
    if message is None:
        check()
    else:
        with pytest.raises(ValueError, match=f"fp8 blocks of CUDA {message}, torch is of {version}: install"):
            check()


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("library", HOPPER["attention_library"][0])
@pytest.mark.parametrize("weight_gradients", HOPPER["weight_gradients"][0])
@pytest.mark.parametrize("architecture", ["minicpm5", "minicpm4"])
def test_on_the_gpu_it_errs_as_formulas_on_a_cpu_do(architecture, weight_gradients, library, scaling, tmp_path):
    """cuBLASLt's fp8 products, CUDA graphs, cuDNN or FlashAttention-4."""
    if library == "flash4":
        pytest.importorskip("flash_attn.cute", reason="not installed: pip install forgetrain[hopper]")
    wide = WIDE["model"] if scaling == "block" else {}
    target = fp8_target(architecture, scaling, model={**wide, "head_dim": 64, "num_hidden_layers": 4})
    plan = PLAN.with_choice("attention_library", library).with_choice("weight_gradients", weight_gradients)
    engine = built(target, tmp_path / "a.py", plan)
    formulas = built(target, tmp_path / "b.py", change=in_torch, device="cpu")
    verdict = g4(pool(engine, target), pool(formulas, target, "cpu"), ratio=1.5)
    assert verdict.passed, verdict
    engine.release()
    assert trained(engine, target, 1)[0] == pytest.approx(trained(formulas, target, 1, "cpu")[0], rel=2e-2)
