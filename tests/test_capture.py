"""``forgetrain.capture``: a training script of one's own becomes a reference, and an engine is aligned with it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forgetrain
from forgetrain.engine.contract import weight_hash
from forgetrain.errors import UserError
from forgetrain.forge.align import align, diagnose
from forgetrain.forge.captured import judge_script, recorded_truths
from forgetrain.forge.collect import ReferenceRejected, open_named
from forgetrain.forge.truth import Start, Truth, ordered_names
from forgetrain.gates.g1 import evidence_names
from forgetrain.golden.record import GoldenRecord
from forgetrain.spec.target import Target, load_target

ROOT = Path(__file__).parents[1]
SCRIPT, TARGET_FILE = ROOT / "examples/train_my_own.py", ROOT / "examples/my_own.toml"
TARGET = load_target(TARGET_FILE)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The example, run as a user runs it."""
    folder = tmp_path_factory.mktemp("runs") / "golden"
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return GoldenRecord.open(folder), done.stdout


@pytest.fixture(scope="module")
def aligned(golden, tmp_path_factory):
    record = open_named(TARGET, golden[0].folder)
    return align(TARGET, tmp_path_factory.mktemp("aligned") / "engine", record)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_my_own", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_step(record: GoldenRecord) -> Truth:
    gates, evidence = TARGET.at_gates_shape(), record.evidence
    start = Start(weights=record.weights)
    names = ordered_names(gates, evidence)
    return Truth(gates, "the golden step", start, record.batches[0], record.learning_rates[0], evidence, names)


# What the example leaves behind


def test_the_example_is_about_a_hundred_lines_of_which_five_are_ours():
    text = SCRIPT.read_text()
    assert len(text.splitlines()) < 125
    assert re.findall(r"# (\d)", text) == list("12345")
    assert text.count("forgetrain") == 1


def test_its_record_has_every_tap_of_the_table(golden):
    record, printed = golden
    due = set(evidence_names(TARGET.model, micro_batches=2))
    # with several micro-batches only the script knows what it calls nll and a share of the loss
    assert due - set(record.evidence) == {f"{place}#fwd@{m}" for place in ("nll", "loss") for m in (0, 1)}
    assert set(record.evidence) <= due
    assert record.manifest["reference"]["name"] == "capture"
    assert record.manifest["reference"]["missing_taps"] == []
    losses = [point["loss"] for point in record.trajectory(1)]
    assert [f"loss {loss:.4f}" for loss in losses] == re.findall(r"loss \d\.\d{4}", printed)
    assert losses[-1] < losses[0] - 0.5
    assert record.learning_rates == [3e-3] * 8


def test_its_last_step_is_kept_with_the_state_before_and_after(golden):
    record, _ = golden
    later = record.later
    assert later is not None
    assert {name for name in later if not name.startswith("start/")} == set(record.evidence)
    start = {name.removeprefix("start/"): later[name] for name in later if name.startswith("start/")}
    assert weight_hash(start) == record.trajectory(1)[6]["weight_hash"]
    assert weight_hash(dict(later)) == record.trajectory(1)[7]["weight_hash"]
    assert (int(start["step"]), int(later["step"]), int(record.evidence["step"])) == (7, 8, 1)


# Aligning with it


def test_an_engine_equals_the_script_bit_for_bit(aligned):
    assert [(verdict.gate, verdict.passed) for verdict in aligned.verdicts] == [
        ("G0", True),
        ("G1", True),
        ("trajectory", True),
    ]
    assert aligned.passed
    assert aligned.plan["attention"] == "sdpa"
    assert aligned.plan["clip"] == aligned.plan["adamw"] == "torch"
    assert "all 8 recorded steps agree bit for bit" in aligned.verdicts[2].explanation


def test_what_was_not_judged_is_said(aligned):
    assert "it was run once, so that it repeats itself was not judged" in aligned.verdicts[0].explanation
    assert "G2 (unseen batches) and G3 (two ranks) were not judged" in aligned.verdicts[1].explanation
    kept = json.loads((aligned.engine.parent / "verdicts.json").read_text())
    assert [verdict["gate"] for verdict in kept["verdicts"]] == ["G0", "G1", "trajectory"]


def test_a_sound_engine_file_is_diagnosed_as_such(golden, aligned):
    assert diagnose(TARGET, aligned.engine, golden[0]).passed


@pytest.mark.parametrize(
    ("sound", "defect", "gate", "first"),
    [
        (
            "F.rms_norm(x, w.shape, w, eps)",
            "F.rms_norm(x, w.shape, w, eps * 10)",
            "G1",
            "model.layers.0.input_layernorm#fwd@0",
        ),
        ("self.updates += 1", "self.updates = 1", "trajectory", "step 1: weight_hash"),
    ],
)
def test_a_defect_is_found(sound, defect, gate, first, golden, aligned, tmp_path):
    source = aligned.engine.read_text()
    file = tmp_path / "engine.py"
    file.write_text(source.replace(sound, defect))
    assert source != file.read_text(), "the defect was not planted"
    result = diagnose(TARGET, file, golden[0])
    assert not result.passed
    assert (result.verdicts[-1].gate, result.verdicts[-1].passed) == (gate, False)
    assert result.verdicts[-1].first_divergence == first


@pytest.mark.slow
def test_the_command(golden, tmp_path):
    command = [sys.executable, "-m", "forgetrain", "align", str(TARGET_FILE), "--runs", str(tmp_path), "--json"]
    done = subprocess.run(
        [*command, "--golden", str(golden[0].folder)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["passed"]
    assert "were not judged" in " ".join(done.stderr.split())
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "forgetrain align TARGET --golden DIR" in done.stderr


# A script used wrongly


class Script:
    """The example's loop, with what a test changes: zero_grad left out, other micro-batches, one call too many."""

    def __init__(self, example, *, target=TARGET, names=None, network=None, zero=True, micro=2, again=False):
        torch.manual_seed(0)
        self.target, self.names, self.zero = target, names or example.NAMES, zero
        self.micro, self.again = micro, again
        self.network = network or example.MyLlama()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def run(self, folder):
        with forgetrain.capture.Capture(folder, self.target, self.network, self.optimizer, self.names) as golden:
            for _ in range(8):
                self.step(golden, torch.randint(0, 256, (4, 33)))
        return golden

    def step(self, golden, rows):
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        golden.begin(tokens, labels)
        if self.zero:
            self.optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in zip(tokens.split(self.micro), labels.split(self.micro), strict=True):
            nll = F.cross_entropy(self.network(x).flatten(0, 1), y.reshape(-1), reduction="none")
            loss = nll.sum() / labels.numel()
            golden.see("nll", nll)
            golden.see("loss", loss)
            loss.backward()
            total = total + loss.detach()
        if self.again:
            self.network(x)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        golden.end(total, norm)


def changed(**sections: dict) -> Target:
    tree = TARGET.plain()
    for section, values in sections.items():
        tree[section] |= values
    return Target.model_validate(tree)


def test_a_right_script_is_near_the_oracle_and_shows_what_it_is_asked_to_see(example, tmp_path):
    Script(example, target=changed(recipe={"weight_decay": 0.0})).run(tmp_path / "golden")
    record = GoldenRecord.open(tmp_path / "golden")
    assert set(record.evidence) == set(evidence_names(TARGET.model, micro_batches=2))
    assert judge_script(recorded_truths(record, golden_step(record))).passed
    shares = [float(record.evidence[f"loss#fwd@{m}"]) for m in (0, 1)]
    assert shares[0] + shares[1] == pytest.approx(float(record.evidence["step.loss"]))


def test_a_missing_zero_grad_is_named_at_the_later_step(example, tmp_path):
    Script(example, zero=False).run(tmp_path / "golden")
    record = GoldenRecord.open(tmp_path / "golden")
    with pytest.raises(ReferenceRejected, match=r"in recorded step 7 the first tap that is far .* is .*#clipped"):
        judge_script(recorded_truths(record, golden_step(record)))


def test_a_model_that_is_not_the_targets_is_named_at_the_tap_where_it_leaves_it(example, tmp_path, monkeypatch):
    """Pairs turned as neighbours, not as halves: the first tap that is far off is the turned query."""

    class Neighbours(nn.Module):
        def forward(self, q, k):
            angle = torch.outer(torch.arange(32.0), 1 / 10000.0 ** (torch.arange(0, 16, 2) / 16))
            cos, sin = angle.cos().repeat_interleave(2, 1), angle.sin().repeat_interleave(2, 1)
            turned = [torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) for x in (q, k)]
            return tuple(x * cos + y * sin for x, y in zip((q, k), turned, strict=True))

    monkeypatch.setattr(example, "Rotary", Neighbours)
    Script(example).run(tmp_path / "golden")
    record = GoldenRecord.open(tmp_path / "golden")
    with pytest.raises(ReferenceRejected) as rejected:
        judge_script(recorded_truths(record, golden_step(record)))
    assert rejected.value.verdict.first_divergence == "model.layers.0.self_attn.q_rope#fwd@0"


def test_it_changes_nothing(example, tmp_path):
    watched, alone = Script(example), Script(example)
    torch.manual_seed(5)
    watched.run(tmp_path / "golden")
    torch.manual_seed(5)
    unseen = Silent()
    for _ in range(8):
        alone.step(unseen, torch.randint(0, 256, (4, 33)))
    for one, other in zip(watched.network.parameters(), alone.network.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in watched.network.modules())


class Silent:
    """What the script calls, doing nothing."""

    def begin(self, *_):
        pass

    see = end = begin


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": changed(reference={"name": "megatron"})}, "reference.name: the target names another reference"),
        ({"target": changed(precision={"dtype": "bf16"})}, "precision.dtype: capture records training in fp32"),
        ({"target": changed(hardware={"threads": 1})}, "hardware.threads: the script runs with 2 threads"),
        ({"target": changed(model={"intermediate_size": 128})}, "blocks.0.gate.weight: has shape [160, 64]"),
        (
            {"target": changed(model={"num_hidden_layers": 3})},
            "model.layers.2.input_layernorm.weight: is in the target",
        ),
        ({"target": changed(model={"tie_word_embeddings": True})}, "head.weight: is not the embedding"),
        ({"target": changed(gates={"steps": 9})}, "gates.steps: the script ended after 8 steps"),
        ({"target": changed(gates={"batch_size": 8})}, "gates: the batch has tokens of shape [4, 32]"),
        ({"micro": 4}, "gates.micro_batch_size: the model is called with tokens of shape [4, 32]"),
        ({"again": True}, "gates.micro_batch_size: the model was called 3 times in a step"),
        ({"names": {"embed": "model.embed_tokens"}}, "blocks.0.norm1.gain: has no canonical name"),
        ({"names": {"embed": "model.embed"}}, "embed: is no place in the table of taps (got 'model.embed')"),
    ],
)
def test_a_script_that_is_not_the_targets_is_refused_in_one_line(options, words, example, tmp_path):
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        Script(example, **options).run(tmp_path / "golden")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_an_optimizer_of_another_model_is_refused(example, tmp_path):
    script = Script(example)
    script.network = example.MyLlama()
    with pytest.raises(UserError, match="does not update every parameter"):
        script.run(tmp_path / "golden")


def test_begin_and_end_come_in_turn_and_a_script_that_raises_leaves_nothing(example, tmp_path):
    script, rows = Script(example), torch.randint(0, 256, (4, 32))
    arguments = (tmp_path / "golden", TARGET, script.network, script.optimizer, example.NAMES)
    for calls, words in (
        (lambda golden: golden.end(1.0, 1.0), "ends that did not begin"),
        (lambda golden: [golden.begin(rows, rows) for _ in range(2)], "begins before the last one ended"),
        (lambda golden: (golden.begin(rows, rows), golden.end(1.0, 1.0)), "no optimizer.step"),
        (lambda golden: golden.see("logits", rows), "is no place in the table of taps"),
        (lambda golden: 1 / 0, "division by zero"),
    ):
        with (
            pytest.raises((UserError, ZeroDivisionError), match=words),
            forgetrain.capture.Capture(*arguments) as golden,
        ):
            calls(golden)
    assert list(tmp_path.iterdir()) == []


def test_torch_is_not_imported_until_capture_is_asked_for():
    code = "import sys, forgetrain; assert 'torch' not in sys.modules; forgetrain.capture.Capture"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
