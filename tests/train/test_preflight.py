import errno
import os
import shutil
from collections import namedtuple

import pytest

from forgetrain.engine.plan import Plan
from forgetrain.engine.write import write_engine
from forgetrain.errors import UserError
from forgetrain.publish.hf import export_hf
from forgetrain.spec.target import StageSpec
from forgetrain.train import preflight
from forgetrain.train.loop import train
from tests.corpus import built
from tests.engine.toy import toy
from tests.train.test_loop import QUIET, run


def plan(target, runs, **options):
    return train(target, runs=runs, console=QUIET, dry_run=True, **options)


def test_a_dry_run_plans_and_trains_nothing(tmp_path):
    schedule = {"steps": 20, "warmup_steps": 4, "decay_steps": 8, "lr": 1.0, "min_lr": 0.0}
    target, _ = built(tmp_path, recipe=schedule, train={"checkpoint_every": 6, "eval_every": 5})
    found = plan(target, tmp_path)
    assert (found["first_step"], found["steps"], found["tokens"]) == (1, 20, 20 * 4 * 16)
    assert (found["checkpoints"], found["evaluations"]) == (4, 4)  # 6, 12, 18, 20; 5, 10, 15, 20
    lr = {point["step"]: point["lr"] for point in found["lr"]}
    assert lr == {1: 0.25, 4: 1.0, 13: 1.0, 17: 0.5, 20: 0.125}
    assert [check["name"] for check in found["checks"]] == ["processes", "memory", "disk", "checkpoint folder"]
    assert found["seconds"] is None
    assert list((tmp_path / target.name / "checkpoints").iterdir()) == []
    assert not (tmp_path / target.name / "train" / "run.json").exists()


@pytest.mark.parametrize("record", ["train/summary.json", "train/run.json"])
def test_a_record_of_another_shape_is_told(tmp_path, record):
    target, _ = built(tmp_path)
    path = tmp_path / target.name / record
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(UserError, match=rf"{record}: is not a JSON object"):
        plan(target, tmp_path)


def test_a_measured_speed_gives_the_expected_time(tmp_path):
    target, _ = built(tmp_path)
    summary = run(target, tmp_path)
    found = plan(target, tmp_path, restart=True)
    assert found["tokens_per_second"] == summary["tokens_per_second"]
    assert found["seconds"] == pytest.approx(found["tokens"] / summary["tokens_per_second"], abs=0.1)
    assert plan(target, tmp_path, resume=True)["tokens"] == 0


def test_a_restart_that_is_refused_removes_nothing(tmp_path, monkeypatch):
    target, _ = built(tmp_path)
    run(target, tmp_path)
    monkeypatch.setattr(preflight, "free_device_memory", lambda device: 1000)
    with pytest.raises(UserError, match=r"hardware: needs at least .* of memory"):
        run(target, tmp_path, restart=True)
    assert (tmp_path / target.name / "checkpoints" / "step-00000006").is_dir()
    assert (tmp_path / target.name / "train" / "summary.json").is_file()


def adamw_engine(target, runs):
    """An engine of the target as it is; it refuses another model, and has the moments of AdamW alone."""
    path = runs / "adamw.py"
    path.write_text(write_engine(target, Plan.textbook()))
    return path


def another_optimizer(target, runs):
    changed = target.model_copy(update={"recipe": target.recipe.model_copy(update={"optimizer": "muon"})})
    return changed, adamw_engine(target, runs), {}, "is an engine of another optimizer"


def another_model(target, runs):
    changed = target.model_copy(update={"model": target.model.model_copy(update={"num_hidden_layers": 3})})
    return changed, adamw_engine(target, runs), {}, "refuses the target"


def a_stage_too_long(target, runs):
    stages = [StageSpec(name="short", steps=5), StageSpec(name="long", steps=1, sequence_length=32)]
    changed = target.model_copy(update={"data": target.data.model_copy(update={"stages": stages})})
    engine = toy(runs)
    head = "def loss(self, batch):\n"
    guard = f"{head}        if batch.tokens.shape[1] > 16: raise RuntimeError('the graph is of 16')\n"
    engine.write_text(engine.read_text().replace(head, guard))
    return changed, engine, {}, "the graph is of 16"


def other_logits(target, runs):
    folder = export_hf(runs / target.name, runs / "hf").folder

    def check(target, initial, chosen):
        raise UserError("logits differ", file=initial.folder, remedy="name another")

    return target, adamw_engine(target, runs), {"init_from": folder, "check_initial": check}, "logits differ"


@pytest.mark.parametrize("wrong", [another_optimizer, another_model, a_stage_too_long, other_logits])
def test_an_engine_that_is_refused_shows_in_a_dry_run_and_a_restart_with_it_removes_nothing(tmp_path, wrong):
    target, _ = built(tmp_path)
    run(target, tmp_path)
    changed, engine, options, says = wrong(target, tmp_path)
    folder = tmp_path / target.name
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".train.lock"}
    for how in ({"dry_run": True}, {}):
        with pytest.raises(UserError, match=says):
            run(changed, tmp_path, restart=True, engine=str(engine), unverified=True, **options, **how)
        assert {path: path.read_bytes() for path in kept if path.is_file()} == kept


def test_too_little_disk_is_refused(tmp_path, monkeypatch):
    target, _ = built(tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, preflight.checkpoint_bytes(target) - 1))
    with pytest.raises(UserError, match=r"checkpoints: 1 checkpoints of 0\.\d MiB need 0\.\d MiB, 0\.\d MiB are free"):
        plan(target, tmp_path)


def test_a_folder_that_takes_no_synced_file_is_refused(tmp_path, monkeypatch):
    target, _ = built(tmp_path)

    def full(descriptor):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="checkpoints: cannot be written: disk quota exceeded"):
        plan(target, tmp_path)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"keep_last": 2, "spike_z": 0.0}, 3),
        ({"keep_last": 2}, 4),
        ({"keep_last": 2, "keep_every": 20, "spike_z": 0.0}, 8),
        ({"keep_last": 50}, 11),
    ],
)
def test_the_most_checkpoints_at_once(tmp_path, settings, most):
    target, _ = built(tmp_path, recipe={"steps": 105}, train={"checkpoint_every": 10, **settings})
    assert preflight.most_checkpoints(target.recipe, target.train) == most
