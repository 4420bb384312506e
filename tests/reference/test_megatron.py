"""megatron-core as a reference: the engine written with its plan equals it bit for bit, and the contract holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forgetrain.engine.contract import weight_hash
from forgetrain.engine.plan import Plan
from forgetrain.engine.process import EngineFailure, EngineProcess
from forgetrain.engine.write import load_engine, write_engine
from forgetrain.errors import UserError
from forgetrain.forge.suspects import suspects
from forgetrain.numerics.compare import difference
from forgetrain.numerics.init import initial_weights
from forgetrain.reference import megatron
from forgetrain.reference.megatron_layout import from_megatron, join_qkv, split_qkv, to_megatron
from forgetrain.reference.megatron_shims import compiled_when_called
from forgetrain.spec.taps import tap_names
from tests.reference.megatron_runs import CASES, target_of
from tests.tiny import ARCHITECTURES, random_batch, tiny_target

#: The computation of megatron-core's local layers, DDP and optimizer.
PLAN = {
    "token_order": "sequence",
    "qkv": "grouped",
    "gate_up": "fused",
    "norm_order": "megatron",
    "rmsnorm": "torch",
    "qk_norm": "torch",
    "linear": "textbook",
    "rope_tables": "fp32",
    "rope": "megatron",
    "attention": "megatron",
    "swiglu": "torch",
    "cross_entropy": "megatron",
    "accumulate": "zeros",
    "clip": "megatron",
    "adamw": "torch",
    "embedding": "torch",
    "residual": "scaled",
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """megatron-core takes seconds to import, so one process runs every case."""
    folder = tmp_path_factory.mktemp("megatron")
    command = [sys.executable, "-m", "tests.reference.megatron_runs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def written(target, folder, **choices):
    path = folder / "engine.py"
    path.write_text(write_engine(target, Plan({**PLAN, **choices})))
    return path


def engine_of(target, folder, **choices):
    module = load_engine(written(target, folder, **choices))
    engine = module.build(target.plain(), device="cpu", precision=target.precision.dtype, mesh=None)
    engine.load(initial_weights(target.model, seed=1))
    return engine


def differences(target, stem, engine):
    """Everything in which an engine leaves the recorded run, in words."""
    expected, tensors = json.loads(stem.with_suffix(".json").read_text()), load_file(stem.with_suffix(".safetensors"))
    assert expected["names"] == tap_names(target.model, micro_batches=2)
    assert len(set(expected["names"])) == len(tensors)
    batch, found = random_batch(target, 3, documents=True), []
    for number, (name, actual) in enumerate(engine.probe(batch)):
        assert name == expected["names"][number]
        differs = difference(tensors[str(number)], actual)
        found += [] if differs is None else [f"{name}: {differs}"]
    for step, due in enumerate(expected["steps"]):
        result = engine.step(random_batch(target, 10 + step, documents=True), 1e-2)
        here = [*(float(value) for value in result), weight_hash(engine.state())]
        found += [] if here == due else [f"step {step}: {here} is not {due}"]
    loss = float(engine.loss(batch))
    return found + ([] if loss == expected["loss"] else [f"loss: {loss} is not {expected['loss']}"])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_engine_with_its_plan_equals_it(case, runs, tmp_path):
    target = target_of(*case)
    assert differences(target, runs / "-".join(case), engine_of(target, tmp_path)) == []


def test_another_norm_parts_where_the_norm_is_to_blame(runs, tmp_path):
    """In a norm's output or in the gradient of what it reads: which of them depends on the processor."""
    target = target_of()
    found = differences(target, runs / "minicpm5-fp32-ignore", engine_of(target, tmp_path, rmsnorm="textbook"))
    tap, _, _ = found[0].partition(": ")
    assert "rmsnorm" in suspects(tap, target)


def test_the_distributed_optimizer_differs_in_the_last_bits_of_the_norm_alone(runs, tmp_path):
    """It sums squares over its flat buffer, not parameter by parameter; taps and clipped gradients are the same."""
    target = target_of(distributed_optimizer=True)
    found = differences(target, runs / "distributed", engine_of(target, tmp_path))
    assert all("#" not in line for line in found), found
    one, other = (json.loads((runs / f"{name}.json").read_text()) for name in ("minicpm5-fp32-ignore", "distributed"))
    for (loss, norm, *_), (their_loss, their_norm, *_) in zip(one["steps"], other["steps"], strict=True):
        assert (their_loss, their_norm) == pytest.approx((loss, norm), rel=1e-6)


def test_the_contract(runs):
    facts = json.loads((runs / "facts.json").read_text())
    assert facts == {
        "shimmed": True,
        "the compiler was imported": False,
        "loaded": True,
        "a probe leaves the state": True,
        "an infinite norm was applied": False,
        "an infinite norm moves nothing": True,
        "a restored run goes on": True,
        "updates": 2,
    }


def test_shims_stay_in_its_own_process(runs):
    """The run above applied them there; this process, which imports the adapter, has torch as it is."""
    assert json.loads((runs / "facts.json").read_text())["shimmed"]
    assert not hasattr(torch.cuda.current_device, "is_shim")
    assert isinstance(torch.zeros, type(torch.arange))  # built in, not the shim's function
    assert torch.zeros(1).type() == "torch.FloatTensor"
    code = "import sys, forgetrain.reference.megatron; sys.exit('megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_marked_for_compiling_is_compiled_at_its_first_call(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or (lambda x: -function(x)))

    def double(x):
        return 2 * x

    with compiled_when_called():
        marked, chosen = torch.compile(double), torch.compile(double, dynamic=True)
    assert (marked.__name__, compiled) == ("double", [double])
    assert [marked(2), marked(3), chosen(2)] == [-4, -6, -4]
    assert compiled == [double, double]
    assert torch.compile(double)(2) == -4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_layout_comes_back_bit_for_bit(architecture):
    model = tiny_target(architecture).model
    weights = {name: torch.randn(shape) for name, shape in model.parameter_shapes().items()}
    theirs = to_megatron(model, weights)
    back = from_megatron(model, theirs)
    assert list(back) == list(weights)
    assert all(difference(weights[name], back[name]) is None for name in weights)
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in weights.values())
    qkv = theirs["decoder.layers.1.self_attention.linear_qkv.weight"]
    rows = model.num_attention_heads // model.num_key_value_heads * model.head_dim
    # Megatron's order: the first group's queries, then its key
    assert torch.equal(qkv[:rows], weights["model.layers.1.self_attn.q_proj.weight"][:rows])
    key = qkv[rows : rows + model.head_dim]
    assert torch.equal(key, weights["model.layers.1.self_attn.k_proj.weight"][: model.head_dim])


@pytest.mark.parametrize("dim", [0, -1])
def test_joining_is_the_inverse_of_splitting(dim):
    model = tiny_target().model
    qkv = torch.randn(128, 128)
    assert torch.equal(join_qkv(model, list(split_qkv(model, qkv, dim)), dim), qkv)


@pytest.mark.parametrize(
    ("architecture", "documents", "key"),
    [("minicpm4", "ignore", "reference.name"), ("minicpm5", "mask+reset", "data.documents")],
)
def test_what_it_does_not_have_is_refused_before_it_is_imported(architecture, documents, key):
    with pytest.raises(UserError, match="transformers reference") as refused:
        megatron.build(target_of(architecture, "fp32", documents).plain(), device="cpu", precision="fp32")
    assert refused.value.key == key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "distributed_optimizer"), [("fp32", False), ("bf16", False), ("fp32", True), ("bf16", True)]
)
def test_two_ranks_sum_gradients_as_the_engine_does(dtype, distributed_optimizer, tmp_path):
    target = target_of("tied", dtype, distributed_optimizer=distributed_optimizer)
    weights = initial_weights(target.model, seed=1)
    with (
        EngineProcess("forgetrain.reference.megatron", target, ranks=2) as reference,
        EngineProcess(written(target, tmp_path), target, ranks=2) as engine,
    ):
        reference.load(weights)
        engine.load(weights)
        for step in range(2):
            batch = random_batch(target, step)
            expected, actual = reference.step(batch, 1e-2), engine.step(batch, 1e-2)
            assert float(expected.loss) == float(actual.loss)
            if distributed_optimizer:  # each rank's shard has its own norm: the last bits differ, as DESIGN says
                assert float(expected.grad_norm) == pytest.approx(float(actual.grad_norm), rel=1e-6)
                continue
            assert float(expected.grad_norm) == float(actual.grad_norm)
            assert weight_hash(reference.state()) == weight_hash(engine.state())


def test_a_norm_that_is_a_tensor_as_on_a_gpu_is_returned_as_a_number(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    target = tiny_target()
    with EngineProcess("tests.reference.tensor_norm", target) as engine:
        engine.load(initial_weights(target.model, seed=0))
        result = engine.step(random_batch(target, 0), 1e-3)
    assert result.grad_norm.shape == ()
    assert bool(result.applied)


@pytest.mark.slow
def test_a_broken_reference_is_an_engine_failure(tmp_path):
    target = target_of("minicpm4")
    with pytest.raises(EngineFailure, match="no muP residual scale"):
        EngineProcess("forgetrain.reference.megatron", target)
