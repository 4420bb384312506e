import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from forgetrain.durable import sha256_file, write_json
from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.train import checkpoint
from forgetrain.train.loop import train
from forgetrain.train.metrics import read_journal
from forgetrain.train.verified import shipped_engine
from tests.corpus import VOCAB, built
from tests.engine.toy import toy
from tests.tiny import tiny_target

QUIET = Console(quiet=True)


def run(target, runs, **options):
    return train(target, runs=runs, console=QUIET, **options)


def losses(runs, target):
    return {
        line["step"]: line["loss"]
        for line in read_journal(runs / target.name / "train" / "metrics.jsonl")
        if "loss" in line
    }


@pytest.mark.parametrize(
    ("sections", "optimizer"),
    [({}, "adamw"), ({"precision": {"dtype": "bf16"}, "data": {"documents": "mask+reset"}}, "adamw"), ({}, "muon")],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, sections, optimizer):
    schedule = {"steps": 9, "warmup_steps": 2, "decay_steps": 3, "optimizer": optimizer}
    settings = {"checkpoint_every": 4, "eval_every": 4}
    target, _ = built(tmp_path, recipe=schedule, train=settings, **sections)
    whole = run(target, tmp_path)
    expected = losses(tmp_path, target)
    first = run(target, tmp_path, restart=True, stop_after=5)
    assert (first["steps"], first["finished"], first["held_out_loss"]) == (5, False, None)
    second = run(target, tmp_path, resume=True)
    assert second["weight_sha256"] == whole["weight_sha256"] != first["weight_sha256"]
    assert second["held_out_loss"] == whole["held_out_loss"]
    assert losses(tmp_path, target) == expected
    assert list(expected) == list(range(1, 10))


def test_a_run_learns_and_says_so(tmp_path):
    target, data = built(tmp_path, recipe={"steps": 60, "lr": 2e-2})
    summary = run(target, tmp_path)
    folder = tmp_path / target.name
    assert summary["held_out_loss"] < summary["unigram_loss"] - 0.1
    assert summary == json.loads((folder / "train" / "summary.json").read_text())
    assert summary["tokens"] == 60 * 4 * 16
    assert 0 < summary["gemm_share_causal"] <= summary["gemm_share_full"] < 1
    record = json.loads((folder / "train" / "run.json").read_text())
    assert record["target"] == target.plain()
    assert record["data"] == data.sha256
    assert list((folder / "train" / "tensorboard").iterdir())
    line = read_journal(folder / "train" / "metrics.jsonl")[0]
    assert {"step", "loss", "grad_norm", "lr", "applied", "tokens_per_second"} <= set(line)


def test_resuming_without_a_checkpoint_starts_and_after_the_end_does_nothing(tmp_path):
    target, _ = built(tmp_path)
    first = run(target, tmp_path, resume=True)
    again = run(target, tmp_path, resume=True)
    assert again["steps"] == first["steps"] == target.recipe.steps
    assert again["weight_sha256"] == first["weight_sha256"]
    assert again["held_out_loss"] == first["held_out_loss"]


def test_an_earlier_run_is_not_thrown_away_unasked(tmp_path):
    target, _ = built(tmp_path)
    run(target, tmp_path, stop_after=2)
    with pytest.raises(UserError, match=r"checkpoints: holds checkpoints of an earlier run.*--resume.*--restart"):
        run(target, tmp_path)


def test_a_damaged_newest_checkpoint_costs_its_steps_only(tmp_path):
    target, _ = built(tmp_path, train={"checkpoint_every": 2, "keep_last": 3})
    whole = run(target, tmp_path)
    root = tmp_path / target.name / "checkpoints"
    (root / "step-00000006" / "__0_0.distcp").write_bytes(b"")
    assert run(target, tmp_path, resume=True)["weight_sha256"] == whole["weight_sha256"]
    assert checkpoint.newest(root, warn=pytest.fail).step == 6


@pytest.mark.parametrize(
    ("section", "changes", "key"),
    [
        ("recipe", {"seed": 5}, r"recipe\.seed"),
        ("recipe", {"batch_size": 2}, r"recipe\.batch_size"),
        ("model", {"rope_theta": 5e5}, r"model\.rope_theta"),
        ("precision", {"dtype": "bf16"}, r"precision\.dtype"),
    ],
)
def test_a_checkpoint_of_another_target_is_refused(tmp_path, section, changes, key):
    target, _ = built(tmp_path)
    run(target, tmp_path, stop_after=2)
    other = target.model_copy(update={section: getattr(target, section).model_copy(update=changes)})
    with pytest.raises(UserError, match=f"step-00000002: {key}: is a checkpoint of another target"):
        run(other, tmp_path, resume=True)


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    target, _ = built(tmp_path)
    run(target, tmp_path, stop_after=2)
    (tmp_path / "corpus" / "new.txt").write_text("more text " * 50)
    built(tmp_path)
    with pytest.raises(UserError, match="was trained on other data"):
        run(target, tmp_path, resume=True)


def test_training_without_data_names_the_command(tmp_path):
    target, data = built(tmp_path)
    (data.folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="Run forgetrain data build TARGET first"):
        run(target, tmp_path)


def test_a_second_ctrl_c_stops_at_once_and_keeps_what_was_saved(tmp_path):
    target, _ = built(tmp_path, train={"checkpoint_every": 2})
    twice = "if self.steps == 3: os.kill(os.getpid(), 2); os.kill(os.getpid(), 2); time.sleep(0.1)"
    with pytest.raises(KeyboardInterrupt):
        run(target, tmp_path, engine=str(toy(tmp_path, step=twice)), unverified=True)
    root = tmp_path / target.name / "checkpoints"
    assert [path.name for path in root.iterdir()] == ["step-00000002"]


NAN = "return StepResult(loss, torch.tensor(float('nan')), torch.tensor(False))"


def test_steps_without_a_finite_norm_are_counted_and_survived(tmp_path):
    target, _ = built(tmp_path, train={"skip_limit": 3})
    engine = toy(tmp_path, after=f"if self.steps in (2, 3, 5): {NAN}")
    summary = run(target, tmp_path, engine=str(engine), unverified=True)
    assert (summary["steps"], summary["skipped_steps"]) == (6, 3)
    lines = read_journal(tmp_path / target.name / "train" / "metrics.jsonl")
    assert [line["applied"] for line in lines if "applied" in line] == [True, False, False, True, False, True]
    assert lines[1]["grad_norm"] is None


def test_too_many_in_a_row_end_the_run_with_the_evidence(tmp_path):
    target, data = built(tmp_path, train={"skip_limit": 2})
    probe = "yield 'model.embed_tokens#fwd@0', batch.mask * float('nan')"
    engine = toy(tmp_path, after=f"if self.steps > 3: {NAN}", probe=probe)
    with pytest.raises(UserError, match=r"evidence-00000005: no finite gradient norm in 2 steps in a row, the last 5"):
        run(target, tmp_path, engine=str(engine), unverified=True)
    from safetensors.torch import load_file

    from forgetrain.data.loader import Loader

    folder = tmp_path / target.name / "train" / "evidence-00000005"
    assert torch.equal(load_file(folder / "batch.safetensors")["tokens"], Loader(data, target).batch_at(4).tokens)
    assert json.loads((folder / "report.json").read_text())["first_bad_tap"] == "model.embed_tokens#fwd@0"


def test_an_engine_that_applies_a_nan_is_refused(tmp_path):
    target, _ = built(tmp_path)
    engine = toy(tmp_path, after=NAN.replace("False", "True"))
    with pytest.raises(UserError, match=r"engine\.py: applied an update with a gradient norm of nan at step 1"):
        run(target, tmp_path, engine=str(engine), unverified=True)


def test_an_engine_that_returns_wrong_shapes_is_refused(tmp_path):
    target, _ = built(tmp_path)
    engine = toy(tmp_path, after="return StepResult(torch.zeros(2), torch.tensor(1.0), torch.tensor(True))")
    with pytest.raises(UserError, match=r"engine\.py: step\(\) returns a wrong loss \(got 'shape \[2\]'\)"):
        run(target, tmp_path, engine=str(engine), unverified=True)


def test_an_engine_without_verdict_is_refused(tmp_path):
    target, _ = built(tmp_path)
    engine = toy(tmp_path)
    with pytest.raises(UserError, match=r"engine\.py: the engine has no verdict for this content.*--unverified"):
        run(target, tmp_path, engine=str(engine))
    record = tmp_path / "verdicts.json"
    record.write_text(json.dumps({"sha256": sha256_file(engine), "verdicts": [{"gate": "G1", "pass": False}]}))
    with pytest.raises(UserError, match="the engine failed G1"):
        run(target, tmp_path, engine=str(engine))
    record.write_text(json.dumps({"sha256": sha256_file(engine), "verdicts": [{"gate": "G1", "pass": True}]}))
    assert run(target, tmp_path, engine=str(engine))["engine"]["status"] == "passed G1"
    engine.write_text(engine.read_text() + "\n")
    with pytest.raises(UserError, match="has no verdict for this content"):
        run(target, tmp_path, engine=str(engine), restart=True)


def test_the_aligned_engine_of_the_run_is_the_default(tmp_path):
    target, _ = built(tmp_path)
    folder = tmp_path / target.name / "engine"
    folder.mkdir()
    engine = toy(folder)
    verdicts = [{"gate": gate, "pass": True} for gate in ("G2", "G1")]
    (folder / "verdicts.json").write_text(json.dumps({"sha256": sha256_file(engine), "verdicts": verdicts}))
    summary = run(target, tmp_path)
    assert summary["engine"] == {"name": str(engine), "sha256": sha256_file(engine), "status": "passed G1, G2"}


def test_an_engine_for_another_model_is_refused_in_one_line(tmp_path):
    target, _ = built(tmp_path)
    run(target, tmp_path, stop_after=1)
    engine = tmp_path / target.name / "train" / "engine.py"
    kept = tmp_path / "kept.py"
    kept.write_text(engine.read_text())
    other = target.model_copy(update={"model": target.model.model_copy(update={"hidden_size": 48})})
    with pytest.raises(UserError, match=r"kept\.py: refuses the target: .*hidden_size"):
        run(other, tmp_path, engine=str(kept), unverified=True, restart=True)


@pytest.mark.parametrize(
    ("mine", "asked", "why"),
    [("adamw", "muon", "has exp_avg_sq/.*, which no such"), ("muon", "adamw", "has no exp_avg_sq")],
)
def test_an_engine_of_another_optimizer_is_refused_before_the_first_step(tmp_path, mine, asked, why):
    target, _ = built(tmp_path, recipe={"optimizer": asked})
    engine = tmp_path / "other.py"
    engine.write_text(
        write_engine(tiny_target(model={"vocab_size": VOCAB}, recipe={"optimizer": mine}), Plan.textbook())
    )
    with pytest.raises(UserError, match=rf"other\.py: recipe\.optimizer: is an engine of another optimizer.*{why}"):
        run(target, tmp_path, engine=str(engine), unverified=True)


def test_megatron_refuses_muon_in_one_line(tmp_path):
    target, _ = built(tmp_path, recipe={"optimizer": "muon"})
    with pytest.raises(
        UserError, match=r"recipe\.optimizer: megatron-core's Muon .* reference\.name = \"transformers\""
    ):
        run(target, tmp_path, engine="megatron")


def test_another_engine_at_resume_is_said(tmp_path):
    target, _ = built(tmp_path)
    run(target, tmp_path, stop_after=2)
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    train(target, runs=tmp_path, console=console, resume=True, engine=str(toy(tmp_path)), unverified=True)
    assert "resuming with the engine" in console.export_text()


def ship(target, verdicts, **changed):
    """Into the folder of engines of the working directory."""
    folder = Path("engines") / target.name
    folder.mkdir(parents=True, exist_ok=True)
    engine = toy(folder)
    plain = target.plain()
    of = {**plain, **{key: {**plain[key], **values} for key, values in changed.items()}}
    write_json(folder / "provenance.json", {"sha256": sha256_file(engine), "target": of, "verdicts": verdicts})
    return engine


def test_an_engine_that_ships_is_named_where_none_is_aligned(tmp_path, monkeypatch):
    target, _ = built(tmp_path)
    monkeypatch.chdir(tmp_path)
    passed, failed = ({"gate": gate, "pass": gate != "G9"} for gate in ("contract", "G9"))
    engine = ship(target, [passed], data={"sources": [{"path": "elsewhere"}]}, train={"log_every": 1})
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    train(target, runs=tmp_path, console=console, stop_after=1)
    assert f"{engine} has passed its gates: --engine {engine} trains with it" in console.export_text()
    assert shipped_engine(target) == engine
    for verdicts, changed in (
        ([passed, failed], {}),
        ([], {}),
        ([passed], {"precision": {"dtype": "bf16"}}),
        ([passed], {"parallel": {"tensor": 2}}),
        ([passed], {"model": {"num_hidden_layers": 9}}),
        ([passed], {"recipe": {"optimizer": "muon"}}),
        ([passed], {"data": {"documents": "mask"}}),
    ):
        ship(target, verdicts, **changed)
        assert shipped_engine(target) is None
    for damaged in ("{", "[]", "{}", '{"target": 3}'):
        (engine.parent / "provenance.json").write_text(damaged)
        assert shipped_engine(target) is None
    shutil.rmtree("engines")
    assert shipped_engine(target) is None


def test_another_environment_at_resume_is_said(tmp_path, monkeypatch):
    target, _ = built(tmp_path)

    def text_of(target, **options):
        console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
        train(target, runs=tmp_path, console=console, **options)
        return console.export_text()

    text_of(target, stop_after=2)
    assert "another environment" not in text_of(target, resume=True, stop_after=3)
    other = target.model_copy(update={"hardware": target.hardware.model_copy(update={"threads": 1})})
    text = text_of(other, resume=True, stop_after=4)
    assert "resuming with hardware.threads = 1, which was 2" in text
    assert "another environment" not in text  # that was told
    monkeypatch.setattr("forgetrain.numerics.determinism._cpu_name", lambda: "an abacus")
    text = text_of(other, resume=True, stop_after=5)
    assert "resuming in another environment, whose bits may differ: processor an abacus, which was" in text


def test_a_held_out_loss_beyond_the_checkpoint_is_not_that_of_the_new_weights(tmp_path):
    target, _ = built(tmp_path, recipe={"steps": 8}, train={"checkpoint_every": 4, "keep_last": 3})
    before = run(target, tmp_path)
    shutil.rmtree(tmp_path / target.name / "checkpoints" / "step-00000008")
    faster = target.model_copy(update={"recipe": target.recipe.model_copy(update={"lr": 1e-1})})
    resumed = run(faster, tmp_path, resume=True)
    assert resumed["held_out_loss"] != before["held_out_loss"]
    assert read_journal(tmp_path / target.name / "train/metrics.jsonl")[-1]["held_out_loss"] == resumed["held_out_loss"]


def test_metrics_beyond_the_checkpoint_are_dropped_at_resume(tmp_path):
    target, _ = built(tmp_path)
    run(target, tmp_path, stop_after=2)
    path = tmp_path / target.name / "train" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # a kill in the middle of a line
    run(target, tmp_path, resume=True)
    steps = [line["step"] for line in read_journal(path) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert not math.isclose(losses(tmp_path, target)[3], 1.0)
