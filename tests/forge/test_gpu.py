"""On a GPU: both references collect, an engine aligns bit for bit, and the fast schedule passes the numeric gates."""

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.forge.align import align
from forgetrain.forge.collect import collect
from forgetrain.judge.runner import Effort, Judge
from forgetrain.numerics.device import this_gpu
from tests.tiny import tiny_target

pytestmark = pytest.mark.gpu

#: Wide enough for the tensor cores' layouts, small enough for a second.
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
SHAPE = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 128}


def gpu_target(architecture, dtype, **sections):
    return tiny_target(
        architecture,
        model=MODEL,
        recipe=SHAPE,
        gates={**SHAPE, "steps": 4, "g5_steps": 20},
        precision={"dtype": dtype},
        hardware={"name": this_gpu()},
        **sections,
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("reference", "architecture"),
    [("megatron", "minicpm5"), ("transformers", "minicpm5"), ("transformers", "minicpm4")],
)
def test_an_engine_aligns_with_the_reference(reference, architecture, dtype, tmp_path):
    target = gpu_target(architecture, dtype, reference={"name": reference})
    record = collect(target, tmp_path / "golden")
    result = align(target, tmp_path / "engine", record, say=print)
    assert [(verdict.gate, verdict.passed) for verdict in result.verdicts] == [
        ("G1", True),
        ("G2", True),
        ("G3", True),
    ], result.as_dict()


@pytest.mark.parametrize("architecture", ["minicpm5", "minicpm4"])
def test_the_hopper_schedule_passes_the_numeric_gates(architecture, tmp_path):
    reference = "megatron" if architecture == "minicpm5" else "transformers"
    target = gpu_target(architecture, "bf16", reference={"name": reference})
    engine = tmp_path / "engine.py"
    engine.write_text(write_engine(target, Plan({"schedule": "hopper"})), encoding="utf-8")
    with Judge(target, effort=Effort(pairs=5, steps=2)) as judge:
        judgement = judge.judge(engine, all_gates=True, on_verdict=lambda verdict: print(verdict.explanation))
    assert judgement.passed, [verdict.as_dict() for verdict in judgement.verdicts if not verdict.passed]
    assert judgement.sandboxed, judgement.sandbox
