"""transformers as a reference: the engine written with its plan equals it bit for bit, and the contract holds."""

from __future__ import annotations

import sys

import pytest
import torch

from forgetrain.engine.contract import Shard, weight_hash
from forgetrain.engine.plan import Plan
from forgetrain.engine.process import EngineProcess
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.errors import UserError
from forgetrain.numerics.compare import difference
from forgetrain.numerics.init import initial_weights
from forgetrain.numerics.oracle import oracle_step
from forgetrain.reference import transformers as adapter
from forgetrain.spec.moments import average_decay, state_shapes
from forgetrain.spec.taps import tap_names
from tests.tiny import ARCHITECTURES, random_batch, tiny_target

#: The computation of transformers' eager models and torch's optimizer.
PLAN = {
    "rmsnorm": "hf",
    "qk_norm": "hf",
    "linear": "torch",
    "rope_tables": "fp32",
    "rope": "hf",
    "attention": "eager",
    "residual": "scaled",
    "swiglu": "torch",
    "cross_entropy": "torch",
    "clip": "torch",
    "adamw": "torch",
    "muon": "torch",
    "norm_order": "huggingface",
    "embedding": "torch",
    "mup": "divide",
    "qkv_sum": "v+k+q",
}


def plan_of(target):
    # MiniCPM's published code turns queries in fp32; SDPA takes grouped keys as they are only where it needs no mask
    rope = "textbook" if target.model.architecture == "minicpm" else "hf"
    sdpa = "sdpa_gqa" if target.data.documents == "ignore" else "sdpa"
    return Plan({**PLAN, "rope": rope, "attention": "eager" if target.reference.attention == "eager" else sdpa})


def target_of(architecture="minicpm5", dtype="fp32", documents="ignore", attention="eager", optimizer="adamw"):
    return tiny_target(
        architecture,
        recipe={"optimizer": optimizer},
        precision={"dtype": dtype},
        data={"documents": documents},
        reference={"name": "transformers", "attention": attention},
    )


def reference_of(target):
    reference = adapter.build(target.plain(), device="cpu", precision=target.precision.dtype, mesh=None)
    reference.load(initial_weights(target.model, seed=1))
    return reference


def written(target, folder):
    path = folder / "engine.py"
    path.write_text(write_engine(target, plan_of(target)))
    return path


@pytest.mark.parametrize(
    ("architecture", "dtype", "documents", "attention"),
    [
        *((name, dtype, "ignore", "eager") for name in ARCHITECTURES for dtype in ("fp32", "bf16")),
        ("minicpm5", "fp32", "mask", "eager"),
        ("qwen3", "bf16", "mask+reset", "eager"),
        ("minicpm5", "bf16", "ignore", "sdpa"),
        ("minicpm4", "fp32", "mask+reset", "sdpa"),
    ],
)
def test_the_engine_with_its_plan_equals_it(architecture, dtype, documents, attention, tmp_path):
    target = target_of(architecture, dtype, documents, attention)
    reference = reference_of(target)
    engine = load_engine(written(target, tmp_path)).build(target.plain(), device="cpu", precision=dtype, mesh=None)
    engine.load(initial_weights(target.model, seed=1))
    batch = random_batch(target, 3, documents=True)
    names = []
    for (name, expected), (found, actual) in zip(reference.probe(batch), engine.probe(batch), strict=True):
        assert name == found
        assert difference(expected, actual) is None, f"{name}: {difference(expected, actual)}"
        names.append(name)
    assert names == tap_names(target.model, micro_batches=2)
    for step in range(3):
        batch = random_batch(target, 10 + step, documents=True)
        expected, actual = reference.step(batch, 1e-2), engine.step(batch, 1e-2)
        assert [float(value) for value in expected] == [float(value) for value in actual]
        assert weight_hash(reference.state()) == weight_hash(engine.state())
    assert float(reference.loss(batch)) == float(engine.loss(batch))


@pytest.mark.parametrize(("architecture", "dtype"), [("minicpm5", "fp32"), ("qwen2", "bf16"), ("tied", "fp32")])
@pytest.mark.parametrize("qkv", ["split", "fused", "grouped"])
def test_with_muon_the_update_is_the_engines_too(architecture, dtype, qkv, tmp_path):
    target = target_of(architecture, dtype, optimizer="muon")
    engine_file = tmp_path / "engine.py"
    engine_file.write_text(write_engine(target, plan_of(target).with_choice("qkv", qkv)))
    reference = reference_of(target)
    engine = load_engine(engine_file).build(target.plain(), device="cpu", precision=dtype, mesh=None)
    engine.restore(copied(reference.state()))
    for step in range(3):
        batch = random_batch(target, 10 + step)
        before = copied(reference.state())
        if qkv == "split":
            expected, actual = reference.step(batch, 1e-2), engine.step(batch, 1e-2)
            assert [float(value) for value in expected] == [float(value) for value in actual]
        else:  # products of packed weights round otherwise: one update from the reference's own gradients
            reference.step(batch, 1e-2)
            engine.restore(before)
            engine.update(packed(engine_file, clipped(before, reference.state(), target.recipe)), 1e-2)
        assert set(engine.state()) == set(reference.state()) == set(state_shapes(target))
        for name, shard in engine.state().items():
            assert float((shard.tensor - reference.state()[name].tensor).abs().max()) <= (0 if qkv == "split" else 1e-3)
    fresh = load_engine(engine_file).build(target.plain(), device="cpu", precision=dtype, mesh=None)
    fresh.restore(copied(engine.state()))
    batch = random_batch(target, 20)
    engine.step(batch, 1e-2), fresh.step(batch, 1e-2)
    assert same(copied(engine.state()), fresh.state())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_fp32_it_is_near_the_oracle(architecture):
    target = target_of(architecture, documents="mask+reset")
    batch = random_batch(target, 3, documents=True)
    reference = reference_of(target)
    exact = oracle_step(target, initial_weights(target.model, seed=1), batch, 1e-2, taps=True)
    found = dict(reference.probe(batch))
    for name, tensor in [*exact.taps, *((f"{name}#clipped", grad) for name, grad in exact.clipped.items())]:
        assert float((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-9)) < 1e-5, name


def test_a_probe_leaves_everything_as_it_was_and_a_restored_run_goes_on_bit_for_bit():
    target = target_of("qwen3", "bf16")
    reference, batch = reference_of(target), random_batch(target, 3)
    reference.step(batch, 1e-2)
    before = copied(reference.state())
    list(reference.probe(batch))
    assert same(before, reference.state())
    reference.step(batch, 1e-2)
    after = copied(reference.state())
    other = adapter.build(target.plain(), device="cpu", precision="bf16", mesh=None)
    other.restore(before)
    other.step(batch, 1e-2)
    assert same(after, other.state())
    assert int(after["step"].tensor) == 2


def test_a_norm_that_is_not_finite_moves_nothing():
    target = target_of()
    reference, batch = reference_of(target), random_batch(target, 3)
    before = copied(reference.state())
    result = reference.step(batch._replace(mask=batch.mask * float("inf")), 1e-2)
    assert not bool(result.applied)
    assert same(before, reference.state())
    assert bool(reference.step(batch, 1e-2).applied)


def test_minicpm_turns_queries_in_fp32_and_rounds_once():
    target = target_of("minicpm4", "bf16")
    taps = dict(reference_of(target).probe(random_batch(target, 3)))
    turned = taps["model.layers.0.self_attn.q_rope#fwd@0"]
    assert turned.dtype == torch.bfloat16
    x = taps["model.layers.0.self_attn.q_proj#fwd@0"].double().unflatten(-1, (-1, target.model.head_dim))
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    exact = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(2)
    # one rounding errs by at most half an ULP, 2^-8; rounded tables and products would err by several
    assert float(((turned.double() - exact).abs() / exact.abs().clamp(min=1e-3)).max()) < 2**-8 + 1e-4


def test_without_transformers_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'forgetrain\[transformers\]'"):
        adapter.build(target_of().plain(), device="cpu", precision="fp32", mesh=None)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_two_ranks_sum_gradients_as_the_engine_does(dtype, tmp_path):
    target = target_of("tied", dtype)
    weights = initial_weights(target.model, seed=1)
    with (
        EngineProcess("forgetrain.reference.transformers", target, ranks=2) as reference,
        EngineProcess(written(target, tmp_path), target, ranks=2) as engine,
    ):
        reference.load(weights)
        engine.load(weights)
        for step in range(2):
            batch = random_batch(target, step)
            expected, actual = reference.step(batch, 1e-2), engine.step(batch, 1e-2)
            assert [float(value) for value in expected] == [float(value) for value in actual]
            assert weight_hash(reference.state()) == weight_hash(engine.state())


def packed(engine_file, gradients):
    return load_engine(engine_file).pack(gradients)


def clipped(before, after, recipe):
    """The gradients that a step put into the moving averages."""
    found = {}
    for key in before:
        kind, _, name = key.partition("/")
        if kind == "exp_avg":
            kept = average_decay(recipe, name, before[key].tensor.dim())
            found[name] = (after[key].tensor - kept * before[key].tensor) / (1 - kept)
    return found


def copied(state):
    return {name: Shard(s.tensor.clone(), s.global_shape, s.offsets) for name, s in state.items()}


def same(one, other):
    return one.keys() == other.keys() and all(difference(one[k].tensor, other[k].tensor) is None for k in one)
