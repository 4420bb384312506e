"""Training through stages: each shape is trained, a resumed run is the same run, and what cannot be is refused."""

import json

import pytest
from rich.console import Console

from forgetrain.errors import UserError
from forgetrain.spec.stages import stages_of
from forgetrain.train.loop import train
from forgetrain.train.stages import mean_length, tokens_by_length
from tests.corpus import built
from tests.engine.toy import toy

STAGES = [
    {"name": "short", "steps": 3},
    {"name": "long", "steps": 2, "sequence_length": 32, "batch_size": 2},
    {"name": "ramp", "steps": 1, "batch_size": 8},
]


def staged(tmp_path, *stages, **sections):
    steps = sum(stage["steps"] for stage in stages)
    target, _ = built(tmp_path, data={"stages": list(stages)}, recipe={"steps": steps}, **sections)
    return target


def run(target, tmp_path, **how):
    return train(target, runs=tmp_path, console=Console(quiet=True), **how)


def test_a_resumed_run_is_the_whole_run_wherever_it_was_cut(tmp_path):
    target = staged(tmp_path, *STAGES, train={"keep_last": 9})
    whole = run(target, tmp_path)
    assert whole["steps"] == 6
    assert whole["tokens"] == 3 * 64 + 2 * 64 + 128
    for cut in (2, 3, 4, 5):
        run(target, tmp_path, restart=True, stop_after=cut)
        assert run(target, tmp_path, resume=True)["weight_sha256"] == whole["weight_sha256"], cut


def test_a_stage_changes_what_is_trained(tmp_path):
    whole = run(staged(tmp_path, *STAGES), tmp_path)
    target = staged(tmp_path, STAGES[0], {"name": "same", "steps": 3})
    assert run(target, tmp_path, restart=True)["weight_sha256"] != whole["weight_sha256"]


def test_stages_still_to_come_may_change_and_past_ones_may_not(tmp_path):
    run(staged(tmp_path, *STAGES), tmp_path, stop_after=3)
    other = staged(tmp_path, STAGES[0], {"name": "new", "steps": 1, "batch_size": 2})
    assert run(other, tmp_path, resume=True)["steps"] == 4
    with pytest.raises(UserError, match=r"data\.stages: is a checkpoint of another target.*within its first 4 batches"):
        run(staged(tmp_path, *STAGES), tmp_path, resume=True)


def test_an_engine_that_cannot_take_a_stage_is_refused_before_the_first_step(tmp_path):
    target = staged(tmp_path, *STAGES)
    engine = toy(tmp_path)
    source = engine.read_text()
    head = "def loss(self, batch):\n"
    assert head in source
    place = source.index(head) + len(head)
    guard = '        if batch.tokens.shape[1] > 16: raise RuntimeError("the graph is of 16")\n'
    engine.write_text(source[:place] + guard + source[place:])
    message = r"does not take sequences of 32 tokens, which stage 'long' has: the graph is of 16"
    with pytest.raises(UserError, match=message):
        run(target, tmp_path, engine=str(engine), unverified=True)
    assert not (tmp_path / target.name / "train").exists()


def test_the_metrics_share_follows_the_stages_length(tmp_path):
    target = staged(tmp_path, *STAGES)
    run(target, tmp_path)
    lines = (tmp_path / target.name / "train" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "gemm_share_full" in line]
    assert len(steps) == 6
    assert all(line["tokens_per_second"] > 0 for line in steps)


def test_tokens_are_counted_by_length_without_those_left_out(tmp_path):
    stages = stages_of(staged(tmp_path, *STAGES))
    assert tokens_by_length(stages, 6, []) == {16: 320, 32: 128}
    assert tokens_by_length(stages, 6, [[2, 4]]) == {16: 256, 32: 64}
    assert mean_length({16: 320, 32: 64}) == round((16 * 320 + 32 * 64) / 384)
    assert mean_length({}) == 0
