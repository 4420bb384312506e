import errno
import os
import shutil
from collections import namedtuple

import pytest

from forgetrain.errors import UserError
from forgetrain.train import preflight
from forgetrain.train.loop import train
from tests.corpus import built
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
