"""The loop on a GPU: results read behind the steps, batches copied ahead, resume bit for bit."""

import pytest
from rich.console import Console

from forgetrain.numerics.device import this_gpu
from forgetrain.train.loop import train
from forgetrain.train.metrics import read_journal
from tests.corpus import built

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_on_a_gpu_equals_an_uninterrupted_one(tmp_path, dtype):
    recipe, settings = {"steps": 25, "warmup_steps": 2}, {"log_every": 4, "eval_every": 10, "checkpoint_every": 8}
    target, _ = built(
        tmp_path, recipe=recipe, train=settings, precision={"dtype": dtype}, hardware={"name": this_gpu(), "count": 1}
    )

    def run(**options):
        summary = train(target, runs=tmp_path, console=Console(quiet=True), **options)
        lines = read_journal(tmp_path / target.name / "train" / "metrics.jsonl")
        return summary, {line["step"]: line["loss"] for line in lines if "loss" in line}

    whole, losses = run()
    assert list(losses) == list(range(1, 26))
    run(restart=True, stop_after=13)
    resumed, again = run(resume=True)
    assert resumed["weight_sha256"] == whole["weight_sha256"]
    assert again == losses
    assert 0 <= resumed["mfu_causal"] <= resumed["mfu_full"] < 1  # of a tiny model, rounded
