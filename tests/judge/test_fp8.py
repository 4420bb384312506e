"""Engines of fp8 targets before the judge: measured against an engine known to be right in fp8, trained against the
reference in bf16. The hopper schedule's run here with formulas in place of kernels."""

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.judge.runner import Effort, Judge
from forgetrain.judge.words import QUESTIONS
from forgetrain.spec.target import Precision
from tests.formulas import in_torch
from tests.judge.test_runner import needs_bubblewrap
from tests.tiny import tiny_target

SHAPE = {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 32}
TARGET = tiny_target(  # wide enough for errors in fp32 to be of their kind, and not of chance
    model={"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256},
    precision={"dtype": "fp8"},
    hardware={"threads": 1},
    recipe=SHAPE,
    gates=SHAPE,
)
EFFORT = Effort(pairs=5, steps=2, timeout=60, keep=True)
STALE = (
    "        self.round_matrices()\n        micro_batches",
    "        if not int(self.updates):\n            self.round_matrices()\n        micro_batches",
)


def make_judge(folder, target=TARGET):
    reference = folder / "reference.py"
    reference.write_text(write_engine(target.for_reference(), Plan.textbook()))
    return Judge(target, reference=reference, effort=EFFORT)


def engine(folder, *replaced, target=TARGET):
    path, source = folder / "engine.py", in_torch(write_engine(target, Plan({"schedule": "hopper"})))
    if replaced:
        assert replaced[0] in source
        source = source.replace(*replaced)
    path.write_text(source)
    return path


def test_there_are_no_bits_to_equal(tmp_path):
    with make_judge(tmp_path) as judge, pytest.raises(UserError, match="no fp8") as refused:
        judge.judge(engine(tmp_path), bitwise=True)
    assert refused.value.key == "precision.dtype"


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["tensor", "block"])
def test_an_honest_engine_passes(scaling, tmp_path):
    """All but G5, which is of trainings that learn: docs/decisions/011-fp8.md has its figures."""
    target = TARGET.model_copy(update={"precision": Precision(dtype="fp8", scaling=scaling)})
    with make_judge(tmp_path, target) as judge:
        file, gates = engine(tmp_path, target=target), ("contract", "G4.update", "G4", "G7", "G8", "G3")
        result = judge.judge(file, gates=gates, all_gates=True)
    assert [v.explanation for v in result.verdicts if not v.passed] == []
    gates = ["contract", "G4.update", "G4.fp32", "G4.fp8", "G7.replay", "G7", "G8", "G3"]
    assert set(gates) <= set(QUESTIONS)
    assert [v.gate for v in result.verdicts] == gates


@needs_bubblewrap
@pytest.mark.slow
def test_weights_that_are_rounded_at_load_alone_are_seen_in_the_race(tmp_path):
    with make_judge(tmp_path) as judge:
        result = judge.judge(engine(tmp_path, *STALE), gates=("G7",))
    verdict = result.first_failure()
    assert verdict is not None
    assert verdict.gate == "G7.replay"
